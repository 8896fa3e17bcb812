"A processed notebook as one Markdown text, in Quarto's dialect: cell options, outputs, figures with their alternative text"
import base64
import posixpath
import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import nbdev.showdoc, pypandoc, yaml
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from nbdev.processors import FilterDefaults, exec_show_docs

from api import ApiRenderer

OPTION = re.compile(r'^#\|\s*([\w-]+)\s*(?::\s*(.*))?$')
PANDOC = ['-f', 'markdown-yaml_metadata_block', '-t', 'html5', '--mathml', '--wrap=none', '--syntax-highlighting=none']
ANSI = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')


@cache
def shell():
    "One for all pages: each takes half a second to end"
    return CaptureShell()


class ShowDocs(exec_show_docs):
    "nbdev's, but names are those of the module that the notebook exports, instead of running its cells once more"
    def begin(self):
        self.k = shell()
        self.k.user_ns.update(vars(import_module(f'fastai_ecg_pma.{ApiRenderer.module}')) if ApiRenderer.module else {}, show_doc=nbdev.showdoc.show_doc)

    def __call__(self, cell):
        if cell.cell_type == 'code' and 'show_doc(' in cell.source: super().__call__(cell)


class Filter(FilterDefaults):
    "The processors of this site"
    def base_procs(self): return [ShowDocs if p is exec_show_docs else p for p in super().base_procs()]


@dataclass
class Text:
    "Front matter and Markdown of a page, its figures `{file name: bytes}` and the cells whose figures have no alternative text"
    front: dict
    md: str = ''
    base: str = ''                                                      # the file to which its links are relative
    figures: dict = field(default_factory=dict)
    missing: list = field(default_factory=list)


def joined(o): return ''.join(o) if isinstance(o, list) else o


def fence(text, classes):
    "A fenced block that is longer than any fence in it"
    ticks = '`'*max(3, 1 + max(map(len, re.findall(r'`{3,}', text)), default=0))
    return f'{ticks}{{{classes}}}\n{text.rstrip()}\n{ticks}'


def options(source):
    "`({option: value}, source without them)` of a code cell"
    opts, lines = {}, source.splitlines()
    while lines and (m := OPTION.match(lines[0])): opts[m[1]] = m[2] or 'true'; lines.pop(0)
    return opts, '\n'.join(lines).strip('\n')


def alts(opts):
    "Alternative texts of a cell's figures: one, or a YAML list"
    text = opts.get('fig-alt', '')
    found = yaml.safe_load(text) if text.startswith(('[', '"', "'")) else text
    return [str(o).strip() for o in (found if isinstance(found, list) else [found]) if o]


def stream(text):
    "What a terminal would show: no colour codes, no overwritten progress"
    return '\n'.join(l.rsplit('\r', 1)[-1] for l in ANSI.sub('', text).replace('\r\n', '\n').rstrip().split('\n'))


def figure(page, data, cell, alt, opts, text):
    "A figure of an output as Markdown; its bytes are kept for the page"
    if not alt: text.missing.append(f'{page.source}: cell {cell.id}')
    name = f'{page.name.replace("/", "-")}-{cell.id}-{len(text.figures)}.png'
    text.figures[name] = base64.b64decode(joined(data))
    attrs = (alt or '').replace('\\', '\\\\').replace('"', r'\"')
    caption = f'\n\n{opts["fig-cap"].strip(chr(34))}\n' if 'fig-cap' in opts else ''
    return f'::: {{.figure}}\n![](/figures/{name}){{alt="{attrs}"}}\n{caption}\n:::'


def output(page, o, cell, told, opts, text):
    "One output of a cell as Markdown"
    if o.output_type == 'stream': return fence(stream(joined(o.text)), f'.output .{o.name}')
    if o.output_type == 'error': return fence(f'{o.ename}: {o.evalue}', '.output .stderr')
    data = o.get('data', {})
    if 'text/markdown' in data: return joined(data['text/markdown'])
    if 'image/png' in data: return figure(page, data['image/png'], cell, told.pop(0) if told else '', opts, text)
    if 'text/html' in data: return '::: {.html-output}\n' + fence(joined(data['text/html']), '=html') + '\n:::'
    return fence(stream(joined(data.get('text/plain', ''))), '.output') if data.get('text/plain') else ''


def code_cell(page, cell, text):
    "Code and outputs of a cell as Markdown, as its options ask"
    opts, source = options(cell.source)
    if opts.get('include') == 'false': return ''
    lang = cell.metadata.get('language', 'python') if cell.metadata else 'python'
    parts = [fence(re.sub(rf'^%%\s*{lang}\n', '', source), f'.{lang} .code')] if source and opts.get('echo') != 'false' else []
    told = alts(opts)
    outs = [o for o in cell.get('outputs', []) if not (opts.get('warning') == 'false' and o.get('name') == 'stderr')]
    if opts.get('output') != 'false': parts += [output(page, o, cell, told, opts, text) for o in outs]
    body = '\n\n'.join(p for p in parts if p)
    return f'::: {{.hero-part}}\n\n{body}\n\n:::' if 'hero' in opts.get('classes', '') else body


def notebook(page):
    "The `Text` of a notebook: nbdev's processors go over it, none of its cells is run"
    nb = read_nb(page.source)
    ApiRenderer.module = page.module
    Filter()(nb)
    text = Text(dict(nb.frontmatter_), base=page.source)
    md = [code_cell(page, c, text) if c.cell_type == 'code' else c.source for c in nb.cells if c.cell_type != 'raw']
    text.md = '\n\n'.join(o for o in md if o)
    return text


def markdown(page):
    "The `Text` of a .qmd file: front matter, and Quarto's `include`"
    front, body = re.match(r'(?:---\n(.*?)\n---\n)?(.*)', Path(page.source).read_text(), re.S).groups()
    text = Text(yaml.safe_load(front or '') or {}, base=page.source)
    if m := re.search(r'\{\{< include (\S+) >\}\}', body):
        text.base = posixpath.normpath(posixpath.join(posixpath.dirname(page.source), m[1]))
        body = body.replace(m[0], Path(text.base).read_text())
    text.md = body
    return text


def read(page): return notebook(page) if page.source.endswith('.ipynb') else markdown(page)


def convert(page):
    "`(Text, HTML)` of a page"
    os.environ['IN_TEST'] = '1'                                         # as nbdev does: nothing is exported while pages are made
    os.chdir(Path(__file__).parents[2])
    nbdev.showdoc.BasicMarkdownRenderer = ApiRenderer
    text = read(page)
    return text, subprocess.run([pypandoc.get_pandoc_path(), *PANDOC], input=text.md, capture_output=True, text=True, check=True).stdout
