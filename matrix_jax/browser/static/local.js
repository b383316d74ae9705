'use strict';
// A world in this tab, in place of the server of the player's page: the page opens it like a socket,
// sends it the same messages and gets the same answers. `worker.js` holds the world.

class LocalWorld {
  readyState = 1;                // WebSocket.OPEN
  #worker = null;                // a promise of it
  #asked = new Map();            // number of a request -> what waits for its answer
  #count = 0;
  #shown = 0;                    // when the last frame handed on is due
  #timers = new Set();

  constructor() {
    const lacks = LocalWorld.lacking();
    if (lacks) { setTimeout(() => this.end(1013, lacks)); return; }
    this.#worker = askForThreads().then(() => {
      const worker = new Worker('worker.js', {type: 'module'});
      worker.onmessage = event => this.#take(event.data);
      worker.onerror = event =>
        this.end(1013, 'The world could not be started: ' + (event.message || 'worker.js failed'));
      return worker;
    });
  }

  // What this browser lacks, in one line, or ''.
  static lacking() {
    const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0,
                  65, 0, 253, 15, 253, 98, 11];
    if (location.protocol === 'file:')
      return 'Browsers do not load a world from a file: serve the folder, such as with '
        + 'python -m http.server';
    const needs = {
      WebAssembly: () => Boolean(window.WebAssembly),
      'WebAssembly with SIMD': () => WebAssembly.validate(new Uint8Array(simd)),
      OffscreenCanvas: () => Boolean(window.OffscreenCanvas),
      DecompressionStream: () => Boolean(window.DecompressionStream),
      'workers that are modules': () => Boolean(window.Worker),
    };
    const missing = Object.keys(needs).find(name => !needs[name]());
    return missing ? 'This browser lacks ' + missing + ', which a world in a tab needs.' : '';
  }

  set onopen(action) { setTimeout(action); }

  send(text) {
    const message = JSON.parse(text);
    if (message.type === 'leave') { this.end(1000, ''); return; }
    this.#tell(message);
  }

  #tell(message) {
    if (this.#worker) this.#worker.then(worker => worker.postMessage(message));
  }

  close() { this.end(1000, ''); }

  end(code, why) {
    if (this.readyState === 3) return;
    this.readyState = 3;
    if (this.#worker) this.#worker.then(worker => worker.terminate());
    for (const timer of this.#timers) clearTimeout(timer);
    if (why && this.onmessage)
      this.onmessage({data: JSON.stringify({type: 'closed', message: why})});
    if (this.onclose) this.onclose({code, reason: why});
  }

  // A file of the session: its content as a Blob, or what came of a file that was handed in.
  file(name, content) {
    if (name === 'video') return Promise.resolve(recorder.take());
    return new Promise((resolve, reject) => {
      this.#asked.set(++this.#count, {resolve, reject});
      this.#tell({type: 'file', name, content, number: this.#count});
    });
  }

  #take(message) {
    if (message.type === 'frames') this.#show(message);
    else if (message.type === 'file') {
      const {resolve, reject} = this.#asked.get(message.number);
      this.#asked.delete(message.number);
      if (message.error) reject(new Error(message.error));
      else resolve(message.content && new Blob([message.content]));
    } else if (message.type === 'broken') this.end(1013, message.message);
    else {
      if (message.type === 'welcome' && message.prompts.length) choosePrompts(message.prompts);
      if (message.type === 'state' && message.record !== undefined) {
        recorder.record(message.record).then(made => this.#hand({...message, recorded: made}));
        return;
      }
      this.#hand(message);
    }
  }

  #hand(message) {
    if (this.readyState === 1) this.onmessage({data: JSON.stringify(message)});
  }

  // Frames of a step, spread evenly up to when the next ones are expected, so that those of a slow
  // step delay no later ones.
  #show({frames, first, key, interval}) {
    const now = performance.now(), end = now + (frames.length - 1) * interval;
    this.#shown = Math.max(this.#shown, now - interval);
    const gap = Math.max(interval / 4, (end - this.#shown) / frames.length);
    frames.forEach((picture, index) => {
      this.#shown += gap;
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        if (this.readyState === 1)
          this.onmessage({data: {frame: first + index, key: index ? 0 : key, picture}});
      }, this.#shown - now);
      this.#timers.add(timer);
    });
  }
}

// Loads the page again through `headers.js`, once, where the server's headers allow no threads. The
// outer page of a frame decides for it.
async function askForThreads() {
  const tried = 'asked for threads';
  if (crossOriginIsolated || window !== window.top || !navigator.serviceWorker
      || sessionStorage.getItem(tried)) return;
  sessionStorage.setItem(tried, 'yes');
  try {
    await navigator.serviceWorker.register('headers.js');
    await navigator.serviceWorker.ready;
  } catch (error) { return; }                // one thread, then
  location.reload();
  await new Promise(() => {});               // until the page is gone
}

// Records what the canvas shows; the server of the player's page makes an mp4 instead.
const recorder = {
  parts: [],
  machine: null,
  // Starts, or ends; resolves to whether a recording was ended.
  async record(on) {
    if (on) {
      if (!window.MediaRecorder) return false;
      this.parts = [];
      this.machine = new MediaRecorder(document.getElementById('canvas').captureStream(),
                                       {videoBitsPerSecond: 4e6});
      this.machine.ondataavailable = event => this.parts.push(event.data);
      this.machine.start(1000);
      return false;
    }
    if (!this.machine) return false;
    const machine = this.machine;
    this.machine = null;
    await new Promise(resolve => { machine.onstop = resolve; machine.stop(); });
    return true;
  },
  take() { return new Blob(this.parts, {type: 'video/webm'}); },
};

// Prompts were encoded when the page was made, so they are chosen from a list.
function choosePrompts(prompts) {
  const field = document.getElementById('prompt');
  const list = document.createElement('select');
  list.id = 'prompt';
  list.replaceChildren(...prompts.map(text => new Option(text, text)));
  field.replaceWith(list);
}

window.openWorld = () => new LocalWorld();
