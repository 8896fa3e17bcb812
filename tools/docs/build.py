"""Make the HTML site from the notebooks: `python tools/docs/build.py`, or `make docs`

nbdev's processors (which run `show_doc` and no other cell) -> Markdown -> pandoc -> one template -> search -> a check of every link. Nothing is fetched.
The order of the pages is nbs/sidebar.yml's. `--serve` shows the built site on this machine.
"""
import argparse
import multiprocessing as mp
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path.insert(0, str(HERE))

import yaml
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from nbdev.config import get_config

import links, page as pg
from cells import convert
from site_server import serve
from page import Page, label

ASSETS = 'style.css', 'site.js', 'theme.js', 'favicon.svg'


# ---- which pages there are

def make_page(source, section):
    "A `Page` for a file of nbs/"
    module = re.search(r'#\| default_exp (\w+)', (ROOT/source).read_text()) if source.endswith('.ipynb') and (ROOT/source).exists() else None
    return Page(pg.address(source).removesuffix('.html'), source, module[1] if module else None, section)


def site_tree():
    "nbs/sidebar.yml as nested `(section, page of the section or None, items)` and pages"
    def walk(items, section=''):
        for o in items:
            o = {'href': o} if isinstance(o, str) else o
            if 'section' in o: yield o['section'], make_page(f'nbs/{o["href"]}', section) if 'href' in o else None, list(walk(o['contents'], o['section']))
            else: yield make_page(f'nbs/{o["href"]}', section)
    return list(walk(yaml.safe_load((ROOT/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']))


def flat(tree):
    "The pages of a tree in the order in which they are read"
    for o in tree:
        if isinstance(o, Page): yield o
        else: yield from ([o[1]] if o[1] else []); yield from flat(o[2])


def out_of_step(sources):
    "What nbs/sidebar.yml forgets, and what it lists in vain"
    there = {p.relative_to(ROOT).as_posix() for ext in ('ipynb', 'qmd') for p in (ROOT/'nbs').rglob(f'*.{ext}') if not any(s[0] in '._' for s in p.relative_to(ROOT).parts)}
    return [f'{p} is in no section of nbs/sidebar.yml' for p in sorted(there - sources)] + [f'nbs/sidebar.yml lists {p}, which is not there' for p in sorted(sources - there)]


def convert_all(pages, n_workers):
    "Each page to HTML, several at a time"
    with ProcessPoolExecutor(n_workers, mp.get_context('spawn')) as pool:
        for p, (p.text, html) in zip(pages, pool.map(convert, pages)):
            p.soup = BeautifulSoup(html, 'html.parser')
            pg.ids(p.soup)
            if 'title' not in p.text.front: p.text.front['title'] = p.soup.h1.extract().get_text()


# ---- the site

def head(page, site):
    "Section, title, subtitle and, of a module, where its source is"
    front, crumb = page.text.front, f'<p class="crumb" data-pagefind-ignore>{page.section}</p>' if page.section else ''
    lead = f'<div class="lead">{inline(front["description"])}</div>' if front.get('description') else ''
    src = f'<p class="module" data-pagefind-ignore><code>{site.lib_name}.{page.module}</code> <a href="{pg.relative(page, f"source/{page.module}.html")}">source</a></p>' if page.module else ''
    return f'<header class="page">{crumb}<h1>{inline(front["title"])}</h1>{lead}{src}</header>'


def inline(text):
    "A line of Markdown as HTML"
    return MarkdownIt().renderInline(str(text))


def hero(page, tree):
    "The first screen of the landing page: what it is, five lines, a figure, where to go; from cells with `#| classes: hero`"
    front, parts = page.text.front, [p.extract() for p in page.soup.select('.hero-part')]
    lines = '\n'.join(e.get_text().rstrip() for p in parts for e in p.find_all('pre', class_='code'))
    code = f'<pre class="python code"><code>{pg.escape(lines, quote=False)}</code></pre>' if lines else ''
    fig = ''.join(str(e) for p in parts for e in p.find_all('figure'))
    first = lambda name: next(p for o in tree if not isinstance(o, Page) and o[0] == name for p in flat([o]))
    buttons = [(first('Tutorials'), 'First tutorial'), (first('API'), 'API'), (first('On real records'), first('On real records').title)]
    go = ''.join(f'<a class="button" href="{p.href}">{pg.escape(t)}</a>' for p, t in buttons)
    return f'<header class="hero"><div class="say"><h1>{inline(front["title"])}</h1><div class="lead">{inline(front["description"])}</div><p class="go">{go}</p>{code}</div>{fig}</header>'


def listing(page, tree):
    "What Quarto's `listing` is for: modules by section, a line each"
    groups = next(o for o in tree if not isinstance(o, Page) and o[1] is page)[2]
    row = lambda p: f'<li><a href="{p.href}"><code>{p.title}</code></a> <span>{inline(p.text.front.get("description", ""))}</span></li>'
    return ''.join(f'<h2 id="{name.lower().replace(" ", "-")}">{name}</h2><ul class="listing">{"".join(map(row, items))}</ul>' for name, _, items in groups)


def finish(page, tree, order, where, site):
    "The whole HTML of a page"
    soup, front = page.soup, page.text.front
    if front.get('listing'): soup.append(pg.tag(soup, listing(page, tree)))
    pg.tables(soup); pg.callouts(soup); pg.figures(soup, page, page.text)
    top = BeautifulSoup(hero(page, tree) if page.name == 'index' else head(page, site), 'html.parser')
    toc = pg.contents(pg.anchors(soup))
    for s in (top, soup):
        for a in s.find_all('a', href=True): where.fix(page, a)
        for img in s.find_all('img'): img['src'] = pg.relative(page, img['src'].lstrip('/')) if img['src'].startswith('/') else img['src']
    return pg.fill(page, pg.colour(str(top)), pg.colour(str(soup)), page.title.replace('`', ''), site, front.get('description', ''), toc, pg.sidebar(page, tree), pg.neighbours(page, order), 'landing' if page.name == 'index' else '')


def write(out, name, text):
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    (out/name).write_text(text)


def build(out, n_workers=2, allow_missing_alt=False):
    "The site into the folder `out`; a list of what is wrong with it"
    site, tree = get_config(ROOT), site_tree()
    order = list(flat(tree))
    if wrong := out_of_step({p.source for p in order}): return wrong
    convert_all(order, n_workers)
    shutil.rmtree(out, ignore_errors=True)
    (out/'figures').mkdir(parents=True)
    where = pg.Links(site)
    where.ids = {p.href: {e['id'] for e in p.soup.find_all(id=True)} for p in order}
    for p in order:
        write(out, p.href, finish(p, tree, order, where, site))
        for name, data in p.text.figures.items(): (out/'figures'/name).write_bytes(data)
    for path in sorted(where.files | {f'fastai_ecg_pma/{p.module}.py' for p in order if p.module}): write_source(out, path, tree, site, order)
    nowhere = Page('404', '')
    write(out, '404.html', pg.fill(nowhere, '<header class="page"><h1>There is no such page</h1></header>', f'<p>Search with <kbd>/</kbd>, or begin at the <a href="{site.doc_baseurl}index.html">start</a>.</p>',
                                   'No such page', site, nav='', index=False, root=site.doc_baseurl))
    for name in ASSETS: shutil.copy(HERE/name, out/name)
    (out/'.nojekyll').touch()
    subprocess.run([sys.executable, '-m', 'pagefind', '--site', str(out), '--quiet'], check=True)
    missing = [] if allow_missing_alt else [f'figure without alternative text: {m} (add `#| fig-alt: …`)' for p in order for m in p.text.missing]
    return missing + [w for w in links.problems(out, site.doc_baseurl)[0] if 'alternative text' not in w or not (allow_missing_alt or missing)]


def write_source(out, path, tree, site, order):
    "A page that shows a file of the repository"
    p = Page(pg.address(path).removesuffix('.html'), path)
    module = next((o.module for o in order if o.module and f'fastai_ecg_pma/{o.module}.py' == path), None)
    write(out, p.href, pg.fill(p, *pg.source_page(path, module), path, site, f'Source of {path}', nav=pg.sidebar(p, tree), index=False, kind='wide'))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', type=Path, default=ROOT/'_docs')
    ap.add_argument('--n-workers', type=int, default=min(4, os.cpu_count() or 1))
    ap.add_argument('--allow-missing-alt', action='store_true', help='figures without alternative text pass')
    ap.add_argument('--serve', action='store_true', help='show what was built before')
    ap.add_argument('--port', type=int, default=8000)
    a = ap.parse_args()
    if a.serve: return serve(a.out, a.port)
    t = time.perf_counter()
    wrong = build(a.out.resolve(), a.n_workers, a.allow_missing_alt)
    if wrong: sys.exit('\n'.join(wrong + [f'{len(wrong)} problems']))
    _, n_pages, n_links = links.problems(a.out)
    print(f'{n_pages} pages, {n_links} links, none broken, {time.perf_counter() - t:.0f} s: {a.out}')


if __name__ == '__main__': main()
