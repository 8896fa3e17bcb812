"Every link, anchor and file of a built site resolves, ids are unique, nothing is loaded from elsewhere: `python tools/docs/links.py _docs`"
import posixpath
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {'script': 'src', 'img': 'src', 'source': 'src', 'iframe': 'src', 'video': 'src', 'audio': 'src', 'link': 'href', 'object': 'data', 'embed': 'src'}


class Reader(HTMLParser):
    "Links `(address, is it loaded)`, ids and figures without alternative text of a page"
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.bare = [], [], []
        self.feed(text)

    def handle_starttag(self, name, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.append(a['id'])
        if name == 'a' and a.get('href') is not None: self.links.append((a['href'], False))
        if name in LOADS and a.get(LOADS[name]): self.links.append((a[LOADS[name]], True))
        if name == 'img' and not (a.get('alt') or '').strip(): self.bare.append(a.get('src'))


def problems(site, base='/'):
    "`(what is wrong, number of pages, number of links)` of a folder of HTML files that is served at `base`"
    site = Path(site)
    pages = {p.relative_to(site).as_posix(): Reader(p.read_text()) for p in sorted(site.rglob('*.html')) if 'pagefind' not in p.parts}
    wrong, n = [], 0
    for name, page in pages.items():
        wrong += [f'{name}: id "{i}" occurs {c} times' for i, c in Counter(page.ids).items() if c > 1]
        wrong += [f'{name}: figure without alternative text: {src}' for src in page.bare]
        for href, loaded in page.links:
            n += 1
            if fault := check(site, pages, name, href, loaded, base): wrong.append(f'{name}: {fault}: {href}')
    return wrong, len(pages), n


def check(site, pages, name, href, loaded, base):
    "What is wrong with a link, or None"
    u = urlsplit(href)
    if u.scheme == 'data': return None
    if u.scheme or u.netloc: return 'loaded from elsewhere' if loaded else None
    path = unquote(u.path)
    if path.startswith('/') and name != '404.html': return 'absolute, which breaks where the site is in a folder'
    target = path.removeprefix(base) or 'index.html' if path.startswith('/') else posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if target == '.': target = 'index.html'
    if target not in pages: return None if (site/target).is_file() else 'broken link'
    return None if not u.fragment or unquote(u.fragment) in pages[target].ids else 'no such anchor'


if __name__ == '__main__':
    wrong, n_pages, n_links = problems(sys.argv[1] if len(sys.argv) > 1 else '_docs')
    print(f'{n_pages} pages, {n_links} links, {len(wrong)} problems')
    if wrong: sys.exit('\n'.join(wrong))
