// Holds one world: its programs, its carry and the key that is held. See `local.js`.

const GREY = 128, REWIND_SECONDS = 60, REWIND_BYTES = 256 * 2 ** 20, THREADS = 4;
const ARRAYS = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array};
const MAGIC = 'matrix_jax world 1\n';

let ort, about, weights, step, prompts, threads, processor;
let carry = null, kept = null, history = [], log = null;
let paused = false, busy = false, symbol = '', key = 0, echoed = 0, echoes = new Map();
let count = 0, frames = 0, spent = 0, random = null;

const post = (message, moved) => self.postMessage(message, moved || []);
const tell = (type, fields) => post({type, ...fields});
const size = shape => shape.reduce((product, one) => product * one, 1);

// --- files -----------------------------------------------------------------------------------------

const progress = {loaded: 0, total: 0, said: 0};

async function load(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(name + ': the server answers ' + answer.status);
  const parts = [], reader = answer.body.getReader();
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    parts.push(value);
    progress.loaded += value.length;
    if (progress.total && performance.now() > progress.said + 100) {
      progress.said = performance.now();
      const [now, all] = [progress.loaded, progress.total].map(one => (one / 1e6).toFixed(1));
      tell('waiting', {message: 'Loading: ' + now + ' of ' + all + ' MB'});
    }
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function unzipped(name) {
  const data = await load(name);
  // Some servers undo the compression by themselves.
  if (data[0] !== 0x1f || data[1] !== 0x8b) return data;
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Whether the step can run on WebGPU, for which WebAssembly must be able to wait.
async function hasGPU() {
  if (!navigator.gpu || !WebAssembly.Suspending) return false;
  return Boolean(await navigator.gpu.requestAdapter().catch(() => null));
}

async function open() {
  about = JSON.parse(new TextDecoder().decode(await load('world.json')));
  processor = await hasGPU() ? 'webgpu' : 'wasm';
  const kind = processor === 'webgpu' ? ['ort.jspi.min.mjs', 'ort-wasm-simd-threaded.jspi']
                                      : ['ort.wasm.min.mjs', 'ort-wasm-simd-threaded'];
  const needed = ['runtime/' + kind[1] + '.wasm.gz', about.weights, 'start.onnx', 'step.onnx'];
  if (about.text) needed.push('prompts.bin');
  progress.total = needed.reduce((sum, name) => sum + about.files[name], progress.loaded);
  const [wasm, data, startProgram, stepProgram, encoded] = await Promise.all(
    needed.map(name => name.endsWith('.gz') ? unzipped(name) : load(name)));
  ort = await import('./runtime/' + kind[0]);
  weights = data;
  // A thread that shares its core with the browser holds up all others, so one core is left to it.
  const cores = (navigator.hardwareConcurrency || 1) - 1;
  threads = self.crossOriginIsolated ? Math.max(1, Math.min(THREADS, cores)) : 1;
  ort.env.logLevel = 'error';
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.wasmPaths = {mjs: new URL('runtime/' + kind[1] + '.mjs', self.location.href).href};
  tell('waiting', {message: 'Preparing the world ...'});
  programs.start = startProgram;
  step = await session(stepProgram);
  prompts = new Map();
  if (about.text) {
    const {shape} = about.programs.step.carry.find(one => one.name === about.text);
    const numbers = new Float32Array(encoded.buffer);
    about.prompts.forEach((text, index) => prompts.set(
      text, numbers.slice(index * size(shape), (index + 1) * size(shape))));
  }
}

const programs = {};

function session(program) {
  return ort.InferenceSession.create(program, {
    executionProviders: processor === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm'],
    externalData: [{path: about.weights, data: weights}],
    graphOptimizationLevel: 'all',
    logSeverityLevel: 3,
  });
}

// --- numbers ---------------------------------------------------------------------------------------

// Standard normal numbers from a seed, by Box and Muller; uniform ones by Marsaglia's xorshift.
function generator(seed) {
  let state = (seed ^ 0x9e3779b9) >>> 0 || 1, spare = null;
  const uniform = () => {
    state ^= state << 13; state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5; state >>>= 0;
    return (state + 0.5) / 2 ** 32;
  };
  for (let index = 0; index < 16; index++) uniform();
  return {
    normal(length) {
      return Float32Array.from({length}, () => {
        if (spare !== null) { const one = spare; spare = null; return one; }
        const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
        spare = radius * Math.sin(angle);
        return radius * Math.cos(angle);
      });
    },
    get state() { return [state, spare]; },
    set state(now) { [state, spare] = now; },
  };
}

const tensor = (one, data) => new ort.Tensor(one.dtype, data, one.shape);
const noise = program => Object.fromEntries(about.programs[program].noise.map(
  one => [one.name, tensor(one, random.normal(size(one.shape)))]));

// A control as numbers: that of its keys, and of each mouse word as much as it says.
function encode(control) {
  const {join, idle} = about.keys;
  const words = control.split(join), turns = words.filter(word => word.includes(':'));
  const rest = words.filter(word => !word.includes(':')).join(join) || idle;
  const vector = about.controls[rest];
  if (!vector) throw new Error('keys.symbol: this world has no control ' + control);
  return turns.reduce((sum, turn) => {
    const [word, amount] = turn.split(':');
    if (!about.amounts[word]) throw new Error('keys.symbol: this world has no control ' + control);
    return sum.map((one, index) => one + amount * about.amounts[word][index]);
  }, [...vector]);
}

// --- the stream ------------------------------------------------------------------------------------

async function pixels(blob) {
  const {width, height} = about;
  const picture = await createImageBitmap(blob, {colorSpaceConversion: 'none'});
  const strip = picture.width === width && picture.height === height * about.start_frames;
  const rows = strip ? picture.height : height;
  const paper = new OffscreenCanvas(width, rows).getContext('2d');
  // A picture of another shape is cut, as the server does.
  const scale = strip ? 1 : Math.max(width / picture.width, height / picture.height);
  paper.drawImage(picture, (width - picture.width * scale) / 2,
                  strip ? 0 : (height - picture.height * scale) / 2,
                  picture.width * scale, picture.height * scale);
  const rgba = paper.getImageData(0, 0, width, rows).data;
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4)
    for (let part = 0; part < 3; part++) rgb[to++] = rgba[from + part];
  return rgb;
}

async function start({name, prompt, seed, picture}) {
  const {width, height, start_frames: length} = about;
  const named = about.starts.find(one => one.name === name);
  let clip = new Uint8Array(length * height * width * 3).fill(GREY);
  if (picture || named) {
    const blob = picture || await fetch(named.file).then(answer => answer.blob());
    const one = await pixels(blob);
    for (let at = 0; at < clip.length; at += one.length)
      clip.set(one.subarray(0, Math.min(one.length, clip.length - at)), at);
  }
  random = generator(seed);
  programs.session ||= await session(programs.start);
  const shape = [1, length, height, width, 3];
  carry = await programs.session.run({frames: new ort.Tensor('uint8', clip, shape),
                                      ...noise('start')});
  log = {world: about.world, start: picture ? 'a picture' : name, seed, prompt, controls: []};
  history = [];
  echoes.clear();
  count = frames = 0;
  write(prompt);
}

function write(prompt) {
  if (!about.text) return;
  const one = about.programs.step.carry.find(leaf => leaf.name === about.text);
  carry = {...carry, [about.text]: tensor(one, prompts.get(prompt))};
}

async function make() {
  const now = performance.now(), held = symbol || about.keys.idle, {width, height} = about;
  if (key > echoed) { echoed = key; echoes.set(count + about.lag, key); }
  const shown = echoes.get(count) || 0;
  echoes.delete(count);
  remember();
  const vector = encode(held), {shape, dtype} = about.control;
  const control = ARRAYS[dtype].from({length: size(shape)}, (_, at) => vector[at % vector.length]);
  const made = await step.run({control: new ort.Tensor(dtype, control, shape), ...noise('step'),
                               ...carry});
  const next = {...carry};
  for (const name of about.programs.step.changed) next[name] = made['next.' + name];
  carry = next;
  log.controls.push(held);
  const pictures = await Promise.all(Array.from({length: about.step_frames}, (_, frame) =>
    createImageBitmap(picture(made.frames.data, 3 * frame * width * height))));
  const took = performance.now() - now;
  spent = spent ? 0.8 * spent + 0.2 * took : took;
  const interval = Math.max(1000 / about.fps, spent / about.step_frames);
  post({type: 'frames', frames: pictures, first: frames, key: shown, interval}, pictures);
  count += 1;
  frames += about.step_frames;
  return took;
}

// The frame of RGB values that begins there.
function picture(rgb, from) {
  const made = new ImageData(about.width, about.height), rgba = made.data;
  for (let to = 0; to < rgba.length; to += 4) {
    rgba[to] = rgb[from++];
    rgba[to + 1] = rgb[from++];
    rgba[to + 2] = rgb[from++];
    rgba[to + 3] = 255;
  }
  return made;
}

// A state per second, as long as there is room.
function remember() {
  const every = Math.max(1, Math.round(about.fps / about.step_frames));
  if (count % every) return;
  history.push(state());
  const bytes = about.programs.step.carry.reduce(
    (sum, one) => sum + size(one.shape) * ARRAYS[one.dtype].BYTES_PER_ELEMENT, 0);
  const room = Math.max(2, Math.min(REWIND_SECONDS, Math.floor(REWIND_BYTES / bytes)));
  while (history.length > room) history.shift();
}

// Tensors are never written to, so a state shares them.
const state = () => ({carry, count, random: random.state, prompt: log.prompt});

function restore(saved) {
  carry = saved.carry;
  random.state = saved.random;
  log.prompt = saved.prompt;
  log.controls.length = Math.min(log.controls.length, saved.count);
  count = saved.count;
  echoes.clear();
}

const report = more => tell('state', {
  paused, recording: busy, kept: Boolean(kept), prompt: log.prompt, ...more});

// --- messages --------------------------------------------------------------------------------------

const handlers = {
  async join() {
    await open();
    await start({name: about.start, prompt: about.prompt, seed: Math.floor(Math.random() * 2 ** 31)});
    const how = processor === 'webgpu' ? 'On the GPU of this machine.'
      : self.crossOriginIsolated ? `Threads of this machine: ${threads}.`
      : 'On one thread: more need the headers Cross-Origin-Opener-Policy: same-origin and '
        + 'Cross-Origin-Embedder-Policy: require-corp from the server.';
    tell('welcome', {
      session: 'tab', resumed: false, world: about.world, width: about.width,
      height: about.height, fps: about.fps, start: about.start, seed: log.seed,
      starts: about.starts.map(one => [one.name, one.caption]), prompts: about.prompts,
      prompt: log.prompt, paused, kept: false, players: 1, grace: 0, message: how,
      shift_frames: about.step_frames, reads_text: about.reads_text, controls: about.keys,
    });
    loop();
  },
  keys(message) {
    encode(message.symbol);
    symbol = message.symbol;
    key = message.id;
  },
  prompt({text}) {
    log.prompt = text;
    write(text);
    report();
  },
  async restart({start: name, prompt}) {
    const text = prompts.size && !prompts.has(prompt) ? about.prompt : prompt;
    await start({name, prompt: text, seed: Math.floor(Math.random() * 2 ** 31)});
    paused = false;
    report({restarted: true});
  },
  pause({on}) { paused = on; report(); },
  rewind({seconds}) {
    const wanted = count - seconds * about.fps / about.step_frames;
    while (history.length > 1 && history[history.length - 1].count > wanted) history.pop();
    const before = count, saved = history.pop();
    if (saved) restore(saved);
    report({rewound: (before - count) * about.step_frames / about.fps});
  },
  keep() { kept = state(); report({saved: true}); },
  recall() { if (kept) { restore(kept); report({recalled: true}); } },
  record({on}) { busy = on; report({record: on}); },
  async file({name, content, number}) {
    try {
      tell('file', {number, content: await filed[name](content)});
    } catch (error) {
      tell('file', {number, error: error.message});
    }
  },
};

const filed = {
  replay: () => JSON.stringify(log, null, 1),
  // A line that says what it is, a line of JSON, then the tensors in the order of the JSON.
  world() {
    const {carry, ...rest} = state(), leaves = about.programs.step.carry;
    const head = MAGIC + JSON.stringify({...rest, world: about.world, leaves}) + '\n';
    return new Blob([head, ...leaves.map(one => carry[one.name].data)]).arrayBuffer();
  },
  async picture(blob) {
    await start({name: '', prompt: log.prompt, seed: Math.floor(Math.random() * 2 ** 31),
                 picture: blob});
    report({restarted: true});
  },
  async load(blob) {
    const data = await blob.arrayBuffer(), text = new TextDecoder('latin1').decode(data);
    const end = text.indexOf('\n', MAGIC.length);
    if (!text.startsWith(MAGIC) || end < 0) throw new Error('not a world file of this page');
    const head = JSON.parse(new TextDecoder().decode(data.slice(MAGIC.length, end)));
    const leaves = about.programs.step.carry;
    if (JSON.stringify(head.leaves) !== JSON.stringify(leaves))
      throw new Error('a file of ' + head.world + ', expected one of ' + about.world);
    const carry = {};
    let at = end + 1;
    for (const one of leaves) {
      const bytes = size(one.shape) * ARRAYS[one.dtype].BYTES_PER_ELEMENT;
      if (at + bytes > data.byteLength) throw new Error('the file ends too early');
      carry[one.name] = tensor(one, new ARRAYS[one.dtype](data.slice(at, at + bytes)));
      at += bytes;
    }
    restore({...head, carry});
    history = [];
    report({loaded: true});
  },
};

// Messages that change the world wait for the step that is being made.
let queue = [];

self.onmessage = async ({data}) => {
  try {
    if (data.type === 'join') await handlers.join();
    else if (data.type === 'keys') handlers.keys(data);
    else if (handlers[data.type]) queue.push(data);
  } catch (error) {
    if (step && carry) tell('error', {message: error.message});
    else tell('broken', {message: 'The world could not be started: ' + error.message});
  }
};

const sleep = time => new Promise(resolve => setTimeout(resolve, time));

async function loop() {
  const period = about.step_frames / about.fps * 1000;
  let due = performance.now(), said = due;
  for (;;) {
    for (const message of queue.splice(0)) {
      try {
        await handlers[message.type](message);
      } catch (error) { tell('error', {message: error.message}); }
    }
    if (paused) { await sleep(20); due = performance.now(); continue; }
    // A step starts as late as its frames can still be on time, so that it uses the newest keys.
    const wait = due - spent - 15 - performance.now();
    if (wait > 1) { await sleep(Math.min(wait, 20)); continue; }
    try {
      await make();
    } catch (error) {
      tell('broken', {message: 'The world stopped: ' + error.message});
      return;
    }
    due = Math.max(due + period, performance.now());
    if (performance.now() > said + 1000) {
      said = performance.now();
      tell('stats', {step_ms: spent, dropped: 0, players: 1});
    }
    await sleep(0);              // keys that waited
  }
}
