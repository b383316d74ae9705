'use strict';
// A service worker that adds the headers without which browsers give a page no threads, for hosts
// that cannot be told to send them. `local.js` registers it.

self.addEventListener('install', () => self.skipWaiting());
self.addEventListener('activate', event => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', event => event.respondWith(answer(event.request)));

async function answer(request) {
  const found = await fetch(request);
  if (!found.status) return found;           // of another origin, not readable
  const headers = new Headers(found.headers);
  headers.set('Cross-Origin-Opener-Policy', 'same-origin');
  headers.set('Cross-Origin-Embedder-Policy', 'require-corp');
  return new Response(found.body, {status: found.status, statusText: found.statusText, headers});
}
