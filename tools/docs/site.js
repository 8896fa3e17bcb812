'use strict';
const $ = (css, el = document) => el.querySelector(css), $$ = (css, el = document) => [...el.querySelectorAll(css)];
const root = new URL(document.currentScript.dataset.root || './', location.href).href;
const say = text => { $('#_said').textContent = ''; setTimeout(() => { $('#_said').textContent = text; }, 50); };

// Colours: as the system has them, light, dark
const themes = ['auto', 'light', 'dark'], html = document.documentElement;
const shown = () => html.dataset.theme || 'auto';
function paint(t) {
  if (t === 'auto') delete html.dataset.theme; else html.dataset.theme = t;
  const names = { auto: 'automatic', light: 'light', dark: 'dark' };
  $('.theme').setAttribute('aria-label', `Colours: ${names[t]}`);
  $('.theme span').textContent = t[0].toUpperCase() + t.slice(1);
}
paint(shown());
$('.theme').addEventListener('click', () => {
  const t = themes[(themes.indexOf(shown()) + 1) % 3];
  paint(t);
  say($('.theme').getAttribute('aria-label'));
  try { if (t === 'auto') localStorage.removeItem('theme'); else localStorage.setItem('theme', t); } catch (e) { /* it holds for this page */ }
});

// Menu of narrow screens
function menu(open) { $('.menu').setAttribute('aria-expanded', open); html.classList.toggle('menu-open', open); }
$('.menu').addEventListener('click', () => menu($('.menu').getAttribute('aria-expanded') !== 'true'));
document.addEventListener('keydown', e => { if (e.key === 'Escape' && html.classList.contains('menu-open')) { menu(false); $('.menu').focus(); } });
const here = $('.side [aria-current]');
if (here && $('.side').scrollHeight > $('.side').clientHeight) $('.side').scrollTop = here.offsetTop - $('.side').clientHeight / 2;

// Code is copied
for (const pre of $$('article pre[class]:not(.output):not(.signature):not(.source)')) {
  const box = document.createElement('div'), b = document.createElement('button');
  box.className = 'copyable'; b.type = 'button'; b.className = 'copy'; b.textContent = 'Copy'; b.setAttribute('aria-label', 'Copy this code');
  pre.replaceWith(box); box.append(pre, b);
  b.addEventListener('click', async () => {
    const good = await copy(pre.textContent.replace(/\n$/, ''));
    b.textContent = good ? 'Copied' : 'Not copied'; say(good ? 'Code copied' : 'The browser did not allow to copy');
    setTimeout(() => { b.textContent = 'Copy'; }, 2000);
  });
}
async function copy(text) { try { await navigator.clipboard.writeText(text); return true; } catch (e) { return false; } }

// What scrolls sideways is reached by keyboard
function reachable() {
  for (const el of $$('article pre, .scroll, article math[display=block]')) {
    const wide = el.scrollWidth > el.clientWidth + 1;
    if (wide) { el.tabIndex = 0; if (el.matches('.scroll')) { el.setAttribute('role', 'region'); el.setAttribute('aria-label', 'Table, scrolls sideways'); } }
    else el.removeAttribute('tabindex');
  }
}
reachable(); addEventListener('resize', reachable);

// Where on the page
const entries = new Map($$('aside.toc a').map(a => [decodeURIComponent(a.hash.slice(1)), a]));
if (entries.size) {
  const heads = [...entries.keys()].map(id => document.getElementById(id)).filter(Boolean);
  const mark = () => {
    const now = heads.filter(h => h.getBoundingClientRect().top < 120).pop();
    for (const [id, a] of entries) { if (now && now.id === id) { a.setAttribute('aria-current', 'true'); a.scrollIntoView({ block: 'nearest' }); } else a.removeAttribute('aria-current'); }
  };
  let due; addEventListener('scroll', () => { due ??= requestAnimationFrame(() => { due = null; mark(); }); }, { passive: true });
}

// Search, by pagefind, from files beside the pages
const dialog = $('dialog.search'), input = $('#_q'), list = $('.search-found'), said = $('.search-said');
let finder, turn = 0;
async function open() {
  menu(false); dialog.showModal(); input.select();
  if (finder) return;
  try { finder = await import(root + 'pagefind/pagefind.js'); await finder.options({ excerptLength: 22 }); await finder.init(); if (input.value) find(); }
  catch (e) { said.textContent = 'Search needs a web server: make docs-serve'; }
}
// what a page calls `LayerStack.forward` or `compare_readouts` is found by its parts, too
async function find() {
  const mine = ++turn, q = input.value.trim();
  const done = () => { list.dataset.query = q; };
  if (!finder || !q) { list.replaceChildren(); said.textContent = ''; return; }
  const { results } = await finder.search(q);
  const data = (await Promise.all(results.slice(0, 15).map(r => r.data()))).filter(d => about(d, q));
  if (mine !== turn) return;
  list.replaceChildren(...data.sort((a, b) => named(b, q) - named(a, q)).map(d => entry(d, q)));
  said.textContent = data.length ? `${data.length} ${data.length === 1 ? 'page' : 'pages'}` : `Nothing about “${q}”`;
  done();
}
// pagefind shortens a word until something fits: a page that holds none of the words' beginnings is not an answer
const about = (d, q) => q.toLowerCase().split(/\s+/).some(w => (d.meta.title + ' ' + d.content).toLowerCase().includes(w.slice(0, Math.max(3, w.length - 3))));
const bare = t => t.toLowerCase().replace(/[^\p{L}\p{N}.]/gu, '');
const named = (d, q) => d.sub_results.some(s => bare(s.title) === bare(q)) ? 2 : bare(d.meta.title).includes(bare(q)) ? 1 : 0;
function entry(d, q) {
  const li = document.createElement('li');
  const subs = d.sub_results.filter(s => s.url.includes('#')).sort((a, b) => (bare(b.title) === bare(q)) - (bare(a.title) === bare(q))).slice(0, 3);
  li.append(link(d.url, d.meta.title, 'title'));
  if (subs.length) for (const s of subs) { li.append(link(s.url, s.title, 'sub')); } 
  const p = document.createElement('p'); p.innerHTML = (subs[0] || d).excerpt; li.append(p);
  return li;
}
function link(url, text, kind) { const a = document.createElement('a'); a.href = url; a.textContent = text; a.className = kind; a.addEventListener('click', () => dialog.close()); return a; }
let wait; input.addEventListener('input', () => { clearTimeout(wait); wait = setTimeout(find, 120); });
dialog.addEventListener('keydown', e => {
  if (e.key !== 'ArrowDown' && e.key !== 'ArrowUp') return;
  const stops = [input, ...$$('a', list)], i = stops.indexOf(document.activeElement) + (e.key === 'ArrowDown' ? 1 : -1);
  if (stops[i]) { stops[i].focus(); e.preventDefault(); }
});
input.addEventListener('keydown', e => { if (e.key === 'Enter') $('a', list)?.click(); });
$('.find').addEventListener('click', open); $('.close').addEventListener('click', () => dialog.close());
dialog.addEventListener('click', e => { if (e.target === dialog) dialog.close(); });
document.addEventListener('keydown', e => { if (e.key === '/' && !e.ctrlKey && !e.metaKey && !e.target.closest('input, textarea, [contenteditable]') && !dialog.open) { e.preventDefault(); open(); } });
