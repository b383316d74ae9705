'use strict';
// A world loads when its button is pressed, and ends when another one starts: two would share the
// processor.
document.addEventListener('click', event => {
  const button = event.target.closest('.world > button');
  if (!button) return;
  for (const frame of document.querySelectorAll('.world > iframe')) {
    frame.parentElement.querySelectorAll('img, button').forEach(part => { part.hidden = false; });
    frame.remove();
  }
  const world = button.parentElement, frame = document.createElement('iframe');
  frame.src = world.dataset.src;
  frame.title = world.dataset.title;
  frame.allow = 'cross-origin-isolated; fullscreen';
  world.querySelectorAll('img, button').forEach(part => { part.hidden = true; });
  world.append(frame);
  frame.addEventListener('load', () => frame.contentWindow.focus());
});
