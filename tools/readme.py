"Write README.md (and the figures beside it) from nbs/index.ipynb; `--check` fails if they are not what the notebook gives"
import re
import sys
import tempfile
from pathlib import Path

import pypandoc
from fastcore.nbio import read_nb, write_nb
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).parents[1]
MEDIA = 'index_files'


def processed():
    "The notebook without hidden cells, directives, and outputs that its cells ask to leave out"
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    for c in nb.cells:
        if c.cell_type == 'code' and re.search(r'^#\|\s*output:\s*false', c.source, re.M): c.outputs = []
    NBProcessor(nb=nb, procs=FilterDefaults().procs()).process()
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    return nb


def build(dest):
    "README.md and its figures into the folder `dest`"
    with tempfile.TemporaryDirectory() as d:
        write_nb(processed(), Path(d)/'index.ipynb')
        text = pypandoc.convert_file(str(Path(d)/'index.ipynb'), 'gfm-raw_html', extra_args=['--wrap=preserve', f'--extract-media={Path(dest)/MEDIA}'])
    text = re.sub(r'^---\n.*?\n---\n+', '', text, flags=re.S).replace(f'{Path(dest)}/', '')
    (Path(dest)/'README.md').write_text('<!-- written by `make readme` from nbs/index.ipynb -->\n\n' + text)


def stale():
    "Files of the built README that differ from those in the repository"
    with tempfile.TemporaryDirectory() as d:
        build(d)
        names = [p.relative_to(d) for p in Path(d).rglob('*') if p.is_file()]
        old = [p.relative_to(ROOT) for p in (ROOT/MEDIA).rglob('*') if p.is_file()] if (ROOT/MEDIA).exists() else []
        return [str(n) for n in {*names, *old} if not (ROOT/n).exists() or not (Path(d)/n).exists() or (ROOT/n).read_bytes() != (Path(d)/n).read_bytes()]


if __name__ == '__main__':
    if '--check' in sys.argv:
        if s := stale(): sys.exit(f'not what nbs/index.ipynb gives: {", ".join(s)}; run `make readme`')
    else: build(ROOT)
