"A page's HTML, from pandoc's: links that hold anywhere, highlighted code, tables that scroll, anchors, contents, the frame around it"
import posixpath
import re
import struct
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from string import Template

from bs4 import BeautifulSoup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CALLOUT = re.compile(r'callout-(\w+)')
SHORT = {'index': 'Start', 'api': 'All modules'}                        # how the sidebar calls a page, where not by its title
PREFIX = re.compile(r'^\d+[a-z]?_')


@dataclass
class Page:
    "A page of the site: its address without `.html`, the file it is made from, the module it documents, the section it stands in"
    name: str
    source: str
    module: str = None
    section: str = ''
    text: object = None
    soup: object = None

    @property
    def href(self): return f'{self.name}.html'

    @property
    def title(self): return self.text.front['title']


def address(path):
    "Where a file of the repository (`nbs/34_stmem.ipynb`, `benchmarks/gate.py`) is found in the site"
    folder, name = posixpath.split(path)
    stem, ext = posixpath.splitext(name)
    if path.startswith('nbs/') and ext in ('.ipynb', '.qmd', '.html'): return posixpath.join(folder, PREFIX.sub('', stem)).removeprefix('nbs/') + '.html'
    if path in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'): return {'README': 'index'}.get(stem, stem.lower()) + '.html'
    return f'source/{path.removeprefix("fastai_ecg_pma/")}'.removesuffix('.py') + '.html'


class Links:
    "Every dialect of links in the notebooks -> one that holds wherever the site is put"
    def __init__(self, cfg):
        self.host = f'{cfg.doc_host}{cfg.doc_baseurl}'.rstrip('/')
        self.blob = re.compile(rf'^(?:{re.escape(cfg.git_url)})?/blob/{re.escape(cfg.branch)}/')
        self.files, self.ids = set(), {}
        self.public = set(re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', (ROOT/'fastai_ecg_pma'/'all.py').read_text(), re.S)[1]))

    def target(self, page, href):
        "`(address in the site, anchor)` of a link on a page, or None for a link that leads out"
        href = self.blob.sub('//repo/', href)
        if self.host and href.startswith(self.host): href = href.removeprefix(self.host) or '/'
        path, _, anchor = href.partition('#')
        if path.startswith('//repo/'): return address(self.note(path.removeprefix('//repo/'))), anchor
        if re.match(r'[a-z][a-z+.-]*:|//', href): return None
        if not path: return page.href, anchor
        if path.startswith('/'): return path.lstrip('/') or 'index.html', anchor
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.text.base), path))
        return address(path if path.startswith('nbs/') else self.note(path)), anchor

    def note(self, path):
        "A file of the repository that needs a page of its own"
        if path.endswith('.py') or (ROOT/path).is_file() and not path.endswith('.md'): self.files.add(path)
        return path

    def nearest(self, target, anchor):
        "A name that has no heading of its own is shown under its class, or on the page"
        known = self.ids.get(target, ())
        while anchor and anchor not in known and '.' in anchor: anchor = anchor.rpartition('.')[0]
        return anchor if anchor in known else ''

    def mistaken(self, page, a):
        "Is it a link that nbdev made of any word which is also the name of some function: a parameter, or one word that is not public?"
        name = a.get_text()
        if not a.find('code') or not a.get('href', '').endswith(f'#{name.lower()}'): return False
        if (cell := a.find_parent('td')) and a.find_parent(class_='api') and not cell.find_previous_sibling('td'): return True
        return bool(re.fullmatch('[a-z]+', name)) and name not in self.public and (self.target(page, a['href']) or ('',))[0] != page.href

    def fix(self, page, a, attr='href'):
        if attr == 'href' and self.mistaken(page, a): a.unwrap(); return
        found = self.target(page, a[attr])
        if not found: return
        target, anchor = found
        if a.find('code') and target in self.ids: anchor = self.nearest(target, anchor)
        a[attr] = ('' if target == page.href and anchor else relative(page, target)) + (f'#{anchor}' if anchor else '')
        if 'target' in a.attrs: del a['target']


def relative(page, target): return posixpath.relpath(target, posixpath.dirname(page.href) or '.')


def tag(soup, html): return BeautifulSoup(html, 'html.parser')


def folding(html):
    "Lines that fold below their own indent where the page is narrow; drawn tables stay as they are and scroll"
    plain = lambda l: re.sub('<[^>]*>', '', l)
    note = lambda l: l if '<span' in l else re.sub(r'(?<=  )#.*', r'<span class="note">\g<0></span>', l)
    def line(l):
        if re.search('[\u2500-\u257f]', l): return f'<span class="line drawn">{l}</span>'
        return f'<span class="line" style="--in:{len(t := plain(l)) - len(t.lstrip(" ")) + 2}ch">{note(l)}</span>'
    return ''.join(map(line, html.splitlines(keepends=True)))


def colour(html):
    "Pygments' classes on every code block of a finished page"
    def one(m):
        name = next((c for c in m[1].split() if c not in ('code', 'signature')), 'text')
        try: lexer = get_lexer_by_name(name if name != 'output' else 'text')
        except ClassNotFound: return m[0]
        return f'<pre class="{m[1]}"><code>{folding(highlight(unescape(m[2]), lexer, HtmlFormatter(nowrap=True)).rstrip())}</code></pre>'
    return re.sub(r'<pre class="([^"]*)"><code>(.*?)</code></pre>', one, html, flags=re.S)


def tables(soup):
    "Tables scroll in a box of their own and say which cells are headers"
    for style in soup.find_all('style', scoped=True): style.decompose()
    for td in soup.select('.html-output td'):
        if len(text := td.get_text(strip=True)) > 24 and ' ' in text: td['class'] = [*td.get('class', []), 'text']
    for t in soup.find_all('table'):
        for col in t.find_all('colgroup'): col.decompose()
        for a in ('border', 'style'): t.attrs.pop(a, None)
        for row in t.find_all('tr'):
            row.attrs.pop('style', None)
            for th in row.find_all('th'):
                if not th.get_text(strip=True): th.name = 'td'; th.attrs.pop('scope', None)
                else: th['scope'] = 'col' if th.find_parent('thead') else 'row'
        t.wrap(soup.new_tag('div', attrs={'class': 'scroll'}))


def figures(soup, page, text):
    "A figure's size is known before it is loaded"
    for img in soup.find_all('img'):
        name = posixpath.basename(img.get('src', ''))
        if not img.get('alt', '').strip() and name not in text.figures: text.missing.append(f'{page.source}: {img.get("src")}')
        if name in text.figures: img['width'], img['height'] = struct.unpack('>II', text.figures[name][16:24])
    for div in soup.find_all('div', class_='figure'):
        div.name = 'figure'
        for img in div.find_all('img'):
            if img.parent.name == 'p': img.parent.unwrap()
        for p in div.find_all('p', recursive=False): p.name = 'figcaption'


def callouts(soup):
    for div in soup.find_all('div', class_=CALLOUT):
        kind = CALLOUT.search(' '.join(div['class']))[1]
        div['class'], div['role'] = ['callout', kind], 'note'
        head = div.find(re.compile('h[2-6]'))
        title = head.extract().get_text() if head and head == div.find(True) else kind.capitalize()
        div.insert(0, tag(soup, f'<p class="callout-title">{escape(title)}</p>'))


def ids(soup):
    "Ids are headings'; a section that is headed by the name which it documents leaves that name its id"
    for s in soup.find_all('section'):                                  # pandoc gives a block that begins with a heading the heading's id
        if s.get('id') and (h := s.find(re.compile('h[1-6]'), recursive=False)): h['id'] = s.attrs.pop('id')
    names = set()
    for h in [h for s in soup.find_all('section', class_='api') if (h := s.find(id=True))]:
        while h['id'] in names: h['id'] += '-1'                         # `Score` and `score`
        names.add(h['id'])
    for h in soup.find_all(['h2', 'h3', 'h4']):
        if h.get('id') in names and 'api' not in h.parent.get('class', []): h['id'] += '-section'


def anchors(soup):
    "A link at every heading; the contents of the page as `(level, id, text)`"
    found = []
    for h in soup.find_all(['h2', 'h3', 'h4']):
        if not h.get('id'): continue
        text = h.get_text()
        found.append((int(h.name[1]), h['id'], text))
        h.append(tag(soup, f'<a class="anchor" href="#{h["id"]}" data-pagefind-ignore aria-label="Link to {escape(text)}">#</a>'))
    return found


def contents(found):
    "The contents of a page as a list"
    items = ''.join(f'<li class="l{n}"><a href="#{i}">{escape(t).replace(".", ".<wbr>").replace("_", "_<wbr>")}</a></li>' for n, i, t in found if n < 4)
    return f'<ul>{items}</ul>' if items else ''


def sidebar(page, tree):
    "The site's contents: sections fold, the one that holds the page is open"
    def item(o):
        if isinstance(o, Page):
            here = ' aria-current="page"' if o is page else ''
            return f'<li><a href="{relative(page, o.href)}"{here}>{escape(label(o))}</a></li>'
        name, head, items = o
        inside = holds(o, page)
        top = item(head) if head else ''
        return f'<li><details{" open" if inside else ""}><summary>{escape(name)}</summary><ul>{top}{"".join(map(item, items))}</ul></details></li>'
    return f'<ul>{"".join(map(item, tree))}</ul>'


def label(page): return SHORT.get(page.name) or page.title.replace('`', '')


def holds(section, page): return section[1] is page or any(o is page if isinstance(o, Page) else holds(o, page) for o in section[2])


def neighbours(page, order):
    i = order.index(page) if page in order else None
    if i is None: return ''
    link = lambda o, rel, word: f'<a rel="{rel}" class="{rel}" href="{relative(page, o.href)}"><span>{word}</span>{escape(label(o))}</a>'
    return (link(order[i-1], 'prev', 'Previous') if i else '') + (link(order[i+1], 'next', 'Next') if i+1 < len(order) else '')


def fill(page, top, body, title, site, description='', toc='', nav='', around='', kind='', index=True, root=None):
    "The template with a page in it"
    root = (posixpath.relpath('.', posixpath.dirname(page.href) or '.') + '/').removeprefix('./') if root is None else root
    inline = f'<details class="toc-inline"><summary>On this page</summary>{toc}</details>' if toc else ''
    aside = f'<aside class="toc" aria-label="On this page"><h2>On this page</h2>{toc}</aside>' if toc else ''
    return Template((HERE/'page.html').read_text()).substitute(
        title=escape(title if title == site.title else f'{title} · {site.title}'), description=escape(description or site.description, quote=True), site=escape(site.title), root=root,
        home=f'{root}index.html', nav=nav, top=top, body=body, inline=inline, aside=aside, around=f'<nav class="around" aria-label="Previous and next page">{around}</nav>' if around else '',
        kind=kind, index='data-pagefind-body' if index else 'data-pagefind-ignore="all"')


def source_page(path, module):
    "A file of the repository, a line an anchor"
    text = (ROOT/path).read_text()
    try: lexer = get_lexer_by_name({'.py': 'python', '.sh': 'bash', '.toml': 'toml', '.cff': 'yaml', '.yml': 'yaml'}.get(Path(path).suffix, 'text'), stripnl=False)
    except ClassNotFound: lexer = get_lexer_by_name('text', stripnl=False)
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).rstrip('\n').split('\n')
    body = ''.join(f'<span class="line" id="L{i}">{l}\n</span>' for i, l in enumerate(lines, 1))
    back = f'<p class="module">What it is for, with examples: <a href="../{module}.html">{module}</a>. This file is written from that notebook.</p>' if module else ''
    return f'<header class="page"><p class="crumb">Source</p><h1>{escape(path)}</h1></header>', f'{back}<pre class="source"><code>{body}</code></pre>'
