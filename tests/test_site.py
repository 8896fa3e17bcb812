"""The built site in a browser, as a reader has it: a phone and a desk, light and dark, a keyboard, a screen reader's rules

Needs chromium; where there is none, these tests are skipped, except in CI (`CI` is set), where they fail. `SITE=folder` tests a site that was built before.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'/'docs'))
import links
from site_server import server

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
PHONE, DESK = dict(width=390, height=844), dict(width=1280, height=800)
SAMPLE = ['index.html', 'tutorials/', 'layers.html', 'studies/is_the_last_layer_best.html', 'changelog.html']


@pytest.fixture(scope='session')
def site(root, tmp_path_factory):
    "The site, built from the notebooks as they are"
    if built := os.environ.get('SITE'): return Path(built).resolve()
    out = tmp_path_factory.mktemp('site')/'site'
    r = subprocess.run([sys.executable, 'tools/docs/build.py', '--out', str(out)], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return out


@pytest.fixture(scope='session')
def address(site):
    with server(site) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://localhost:{s.server_port}/'
        s.shutdown()


@pytest.fixture(scope='session')
def browser():
    if not CHROMIUM:
        assert not os.environ.get('CI'), 'chromium is missing: apt-get install chromium'
        pytest.skip('no chromium on this machine')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def tab(browser, address):
    "A tab of a given size; what goes wrong in it is in `tab.wrong`"
    made = []
    def get(size=DESK, scheme='light', **kwargs):
        c = browser.new_context(viewport=size, color_scheme=scheme, base_url=address, **kwargs)
        made.append(c)
        return watched(c.new_page(), address)
    yield get
    for c in made: c.close()


def watched(tab, address):
    "A tab that keeps console errors, failed requests, bad answers and requests to other hosts in `tab.wrong`"
    tab.wrong = wrong = []
    tab.on('console', lambda m: wrong.append(f'console: {m.text}') if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: wrong.append(f'error: {e}'))
    tab.on('requestfailed', lambda r: None if r.failure == 'net::ERR_ABORTED' else wrong.append(f'failed: {r.url}'))     # aborted: we went on to the next page
    tab.on('response', lambda r: wrong.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    tab.on('request', lambda r: None if r.url.startswith((address, 'data:', 'blob:')) else wrong.append(f'elsewhere: {r.url}'))
    return tab


FACTS = """async () => {
  const imgs = [...document.images], vis = css => [...document.querySelectorAll(css)].filter(e => e.checkVisibility()).length;
  await Promise.all(imgs.map(i => i.decode().catch(() => null)));
  return {
    bare: imgs.filter(i => !i.alt.trim()).map(i => i.src), empty: imgs.filter(i => !i.naturalWidth).map(i => i.src),
    squeezed: imgs.filter(i => i.checkVisibility() && Math.abs(i.naturalWidth/i.naturalHeight * i.clientHeight/i.clientWidth - 1) > .12).map(i => i.src),
    wide: document.documentElement.scrollWidth - innerWidth, h1: vis('h1'), main: vis('main'), header: vis('body > header'), footer: vis('body > footer'),
    nav: document.querySelectorAll('nav[aria-label=Site]').length, lang: document.documentElement.lang, title: document.title,
    description: document.querySelector('meta[name=description]').content.length };
}"""


def page_names(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if 'pagefind' not in p.parts and p.name != '404.html')


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_every_page_opens_and_fits(site, tab, size):
    t, faults, titles = tab(size), [], {}
    for name in page_names(site):
        t.wrong.clear()
        t.goto(name, wait_until='load')
        f = t.evaluate(FACTS)
        titles.setdefault(f['title'], []).append(name)
        ok = not (f['bare'] or f['empty'] or f['squeezed']) and f['wide'] <= 0 and f['description'] > 10 and f['lang'] == 'en'
        ok &= [f[k] for k in ('h1', 'main', 'header', 'footer', 'nav')] == [1]*5
        if t.wrong or not ok: faults.append(f'{name}: {t.wrong} {f}')
    assert not faults, '\n'.join(faults)
    assert [n for n in titles.values() if len(n) > 1] == []            # each has a title of its own


def test_links_resolve(site, root):
    wrong, n_pages, n_links = links.problems(site)
    assert wrong == [] and n_pages > 100 and n_links > 5000, (wrong, n_pages, n_links)


def test_the_sidebar_is_quartos(site, root):
    "nbs/sidebar.yml, which Quarto reads, and the built pages have the same sections with the same pages, in this order"
    quarto = yaml.safe_load((root/'nbs/_quarto.yml').read_text())
    assert {'nbdev.yml', 'sidebar.yml'} == set(quarto['metadata-files']) and (root/'nbs'/quarto['format']['html']['css']).exists()
    nav = BeautifulSoup((site/'index.html').read_text(), 'html.parser').find('nav', id='_nav')
    address = lambda p: re.sub(r'(^|/)\d+[a-z]?_', r'\1', str(Path(p).with_suffix('.html')))
    def declared(items):
        for o in items:
            if isinstance(o, str): yield address(o)
            else: yield o['section'], [*([address(o['href'])] if 'href' in o else []), *declared(o['contents'])]
    def built(ul):
        for li in ul.find_all('li', recursive=False):
            if d := li.find('details', recursive=False): yield d.summary.get_text(), [*built(d.find('ul', recursive=False))]
            else: yield li.a['href']
    assert list(built(nav.ul)) == list(declared(yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']))


def test_every_public_name_is_documented(site, root):
    "Each name in the `__all__` of a module has its place on that module's page, with its signature and its source"
    n = 0
    for py in (root/'fastai_ecg_pma').glob('[a-z]*.py'):
        tree = ast.parse(py.read_text())
        public = next(ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign) and s.targets[0].id == '__all__') if py.stem != 'all' else []
        defined = {s.name: s.lineno for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))}
        soup = BeautifulSoup((site/f'{py.stem}.html').read_text(), 'html.parser')
        boxes = {b.find(['h3', 'h4']).contents[0]: b for b in soup.find_all('section', class_='api')}
        for name in set(public) & set(defined):
            box = boxes[name]
            n += 1
            assert box.find('pre', class_='signature').get_text().startswith(name)
            assert box.find('a', class_='source')['href'] == f'source/{py.stem}.html#L{defined[name]}'
    assert n > 150, n


def test_hidden_cells_stay_hidden(site, root):
    hides = lambda src: re.search(r'^#\|\s*(hide|echo: false|include: false)\s*$', src, re.M)
    n = 0
    for nb in (root/'nbs').rglob('*.ipynb'):
        text = BeautifulSoup((site/links_address(nb, root)).read_text(), 'html.parser').main.get_text()
        code = [''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
        lines = lambda cells: {l.strip() for s in cells for l in s.splitlines() if len(l.strip()) > 50 and not l.startswith('#|')}
        hidden = lines(s for s in code if hides(s)) - lines(s for s in code if not hides(s))
        n += len(hidden)
        assert [l for l in hidden if l in text] == [], nb.name
        assert not re.search(r'^#\| *\w', text, re.M), nb.name         # nor is any cell's option shown
        assert '](/' not in text, f'{nb.name}: nbdev links a back-ticked name by itself; inside of a link it must not be back-ticked'
    assert n > 200, n


def links_address(nb, root): return re.sub(r'(^|/)\d+[a-z]?_', r'\1', nb.relative_to(root/'nbs').with_suffix('.html').as_posix())


def test_nbdevs_own_way_is_open(root, tmp_path):
    "What `nbdev-docs` does with each notebook before Quarto has it: its processors, which run exported cells, cells with an import, and `show_doc`"
    code = """
import glob, os, sys, warnings
from pathlib import Path
os.environ['IN_TEST'] = '1'; warnings.simplefilter('ignore')
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb
for p in sorted(glob.glob('nbs/**/*.ipynb', recursive=True)):
    try: exec_nb(Path(p).resolve(), Path(sys.argv[1])/'nb.ipynb', FilterDefaults)
    except Exception as e: print(p, e, flush=True)
os._exit(0)                                                             # a shell for each notebook, each slow to end
"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0 and not r.stdout, r.stdout + r.stderr


def search(t, words):
    "Addresses that the search gives, best first"
    t.locator('#_q').fill(words)
    expect(t.locator('.search-found')).to_have_attribute('data-query', words)
    return [a.get_attribute('href') for a in t.locator('.search-found a').all()]


def test_search_finds(tab):
    t = tab()
    t.goto('index.html')
    t.keyboard.press('/')
    assert t.evaluate('document.activeElement.id') == '_q'
    base = t.evaluate('location.origin') + '/'
    for words, want in {'compare_readouts': 'compare.html#compare_readouts', 'LayerStack': 'layers.html#layerstack', 'pma_learner': 'learner.html#pma_learner', 'pretrain_learner': 'learner.html#pretrain_learner',
                        'check_records': 'doctor.html#check_records', 'load_pma': 'saved.html#load_pma', 'macro_auroc': 'metrics.html', 'readouts': 'compare.html', 'onnxruntime': 'studies/prediction_time.html'}.items():
        found = [f.removeprefix(base).lstrip('/') for f in search(t, words)]
        assert any(f.startswith(want) for f in found[:6]), (words, found)
    assert search(t, 'web server folder') and any('tutorials/' in f for f in search(t, 'service folder'))
    assert search(t, 'qqqqzzzz') == [] and 'Nothing' in t.locator('.search-said').inner_text()
    search(t, 'LayerStack')
    t.keyboard.press('ArrowDown'); t.keyboard.press('ArrowDown'); t.keyboard.press('Enter')
    t.wait_for_url('**/layers.html#layerstack')
    assert not t.wrong


@pytest.mark.parametrize('size', [DESK, PHONE], ids=['desk', 'phone'])
def test_long_lines_fold(tab, size):
    t = tab(size)
    for page in ('tutorials/tsai.html', 'howto/shell.html', 'learner.html'):
        t.goto(page)
        lines = "[...document.querySelectorAll('main pre:not(.source)')].map(p => [p.scrollWidth - p.clientWidth, !!p.querySelector('.drawn')])"
        assert max(n for n, drawn in t.evaluate(lines) if not drawn) <= 1
    t.goto('howto/shell.html')
    assert 'drawn' in t.locator('.line', has_text='┏').first.get_attribute('class')


def test_a_parameter_is_no_link(site):
    pages = {n: BeautifulSoup((site/n).read_text(), 'html.parser') for n in ('compare.html', 'data.html', 'records.html', 'contract.html', 'tutorials/deploy.html')}
    assert not [(name, a.get_text()) for name, soup in pages.items() for a in soup.select('.api td:first-child a')]
    assert [a['href'] for a in pages['tutorials/deploy.html'].select('main a[href$="#calibrate"]')]    # what is public is linked still
    assert not pages['contract.html'].select('main a[href="trainings.html#alone"]')


def test_code_is_copied(tab):
    t = tab(permissions=['clipboard-read', 'clipboard-write'])
    t.goto('layers.html')
    box = t.locator('.copyable').filter(has=t.locator('pre.code')).first
    box.hover()
    box.locator('.copy').click()
    code = box.locator('pre').text_content().rstrip('\n')
    assert t.evaluate('navigator.clipboard.readText()') == code and '\n' in code
    box.locator('pre code').evaluate('e => getSelection().selectAllChildren(e)')
    assert t.evaluate('getSelection().toString()') == code                              # selected with the mouse, too
    expect(t.locator('#_said')).to_have_text('Code copied')
    assert not t.wrong


def ground(t): return t.evaluate('getComputedStyle(document.body).backgroundColor')


def test_colours_follow_the_system_or_the_choice(tab):
    light, dark = tab(), tab(scheme='dark')
    for t in (light, dark): t.goto('index.html')
    assert ground(light) == 'rgb(255, 255, 255)' != ground(dark)
    light.locator('.theme').click(); assert ground(light) == 'rgb(255, 255, 255)'
    light.locator('.theme').click(); assert ground(light) == ground(dark)
    light.goto('layers.html'); assert ground(light) == ground(dark)     # remembered, on the next page too
    assert light.locator('.theme').get_attribute('aria-label') == 'Colours: dark'
    light.locator('.theme').click(); assert ground(light) == 'rgb(255, 255, 255)'


def test_menu_of_a_phone(tab):
    t = tab(PHONE)
    t.goto('layers.html')
    button, nav = t.locator('.menu'), t.locator('#_nav')
    assert not nav.is_visible() and button.get_attribute('aria-expanded') == 'false'
    button.click(); assert nav.is_visible() and button.get_attribute('aria-expanded') == 'true'
    t.keyboard.press('Escape'); assert not nav.is_visible()
    button.click(); nav.get_by_role('link', name='gate', exact=True).click()
    t.wait_for_url('**/gate.html')


def test_everything_is_there_without_scripts(tab):
    t = tab(PHONE, java_script_enabled=False)
    t.goto('layers.html')
    assert t.locator('#_nav').is_visible() and not t.locator('.menu').is_visible() and t.locator('main h1').is_visible()


def test_keyboard(tab):
    t = tab()
    t.goto('layers.html')
    t.keyboard.press('Tab')
    assert t.evaluate('document.activeElement.className') == 'skip'
    t.keyboard.press('Enter')
    assert t.evaluate('document.activeElement.id') == '_main'
    t.keyboard.press('Tab')
    assert t.evaluate('document.activeElement.closest("main") !== null && getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    t.keyboard.press('/'); assert t.locator('dialog.search').is_visible()
    t.keyboard.press('Escape'); assert not t.locator('dialog.search').is_visible()


def test_the_first_screen_says_it(tab):
    t = tab()
    t.goto('index.html')
    for css in ('.hero h1', '.hero .lead', '.hero pre', '.hero img', '.hero .button >> nth=2'):
        b = t.locator(css).first.bounding_box()
        assert b['y'] + b['height'] <= DESK['height'], css
    assert 4 <= len([l for l in t.locator('.hero pre').inner_text().splitlines() if l.strip()]) <= 7


def test_opened_from_a_folder(site, browser):
    "Without a server everything but the search works"
    c = browser.new_context(viewport=DESK)
    t = watched(c.new_page(), 'file://')
    t.goto((site/'index.html').as_uri()); t.locator('a.button').first.click(); t.locator('nav.around .next').click()
    f = t.evaluate(FACTS)
    assert not t.wrong and not f['empty'] and f['wide'] <= 0
    c.close()


def test_a_missing_page_says_so(tab):
    t = tab()
    t.goto('no/such.html')
    assert 'no such page' in t.locator('h1').inner_text()
    t.get_by_role('link', name='start').click(); t.wait_for_url('**/index.html')


@pytest.mark.parametrize('size, scheme', [(PHONE, 'light'), (DESK, 'dark')], ids=['phone-light', 'desk-dark'])
def test_rules_of_accessibility(site, tab, scheme, size):
    from axe_playwright_python.sync_playwright import Axe
    t, axe, found = tab(size, scheme, bypass_csp=True), Axe(), []
    tutorial = next(n for n in page_names(site) if n.startswith('tutorials/'))
    for name in [tutorial if n == 'tutorials/' else n for n in SAMPLE] + ['api.html', 'source/layers.html', 'contributing.html']:
        t.goto(name)
        found += faults(name, axe.run(t))
    t.keyboard.press('/'); search(t, 'gate'); found += faults('search', axe.run(t))
    assert not found


def faults(name, result): return [(name, v['id'], v['nodes'][0]['html'][:150], len(v['nodes'])) for v in result.response['violations'] if v['impact'] in ('serious', 'critical')]
