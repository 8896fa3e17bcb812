"How the site shows a documented name: the signature as its author wrote it, then a table of its parameters"
import ast
import inspect
import re
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from textwrap import wrap

from fastcore.docments import docments
from nbdev.doclinks import patch_name
from nbdev.showdoc import BasicMarkdownRenderer

LIB = Path(__file__).parents[2]/'fastai_ecg_pma'
DEFS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


@lru_cache(None)
def definitions(module):
    "`{qualified name: syntax tree}` of what a module of the library defines"
    out = {}
    for node in ast.parse((LIB/f'{module}.py').read_text()).body:
        if not isinstance(node, DEFS): continue
        for name in ([n] if isinstance(n := patch_name(node), str) else n): out[name] = node
        if isinstance(node, ast.ClassDef): out |= {f'{node.name}.{n.name}': n for n in node.body if isinstance(n, DEFS)}
    return out


def written(node, source):
    "`{parameter: (annotation, default)}` as the author wrote them"
    a = node.args
    plain = a.posonlyargs + a.args
    pairs = [*zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults), *zip(a.kwonlyargs, a.kw_defaults), *((o, None) for o in (a.vararg, a.kwarg) if o)]
    return {p.arg: tuple(ast.get_source_segment(source, o) if o else '' for o in (p.annotation, d)) for p, d in pairs}


def value(v):
    "A default that is known only at run time, in a few characters"
    if isinstance(v, partial): return f'partial({value(v.func)}, …)'
    text = v.__name__ if hasattr(v, '__name__') else repr(v)
    return '…' if len(text) > 40 or text.startswith('<') else text


def code(text):
    "A code span that may stand in a table"
    return f'<code>{escape(text).replace("|", "&#124;")}</code>' if '|' in text else f'`{text}`'


def in_table(text):
    "One line of Markdown as the cell of a table"
    text = re.sub(r'`([^`]*\|[^`]*)`', lambda m: code(m[1]), text)
    return ' '.join(re.sub(r'(?<!\\)\|', r'\\|', text).split())


def rows(described):
    "A Markdown table of parameters"
    typed, optional = any(a for _, a, _, _ in described), any(d for _, _, d, _ in described)
    head = ['Parameter', *['Type']*typed, *['Default']*optional, 'What it is']
    body = [[code(n) if n != 'returns' else '**returns**', *[code(a) if a else '']*typed, *[code(d) if d else '']*optional, in_table(t)] for n, a, d, t in described]
    return '\n'.join(f'| {" | ".join(o)} |' for o in [head, ['---']*len(head), *body])


class ApiRenderer(BasicMarkdownRenderer):
    "What `show_doc` gives on this site; `module` is the one whose page is being made"
    module = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.node = definitions(self.module).get(self.nm) if self.module else None
        init = definitions(self.module).get(f'{self.nm}.__init__') if isinstance(self.node, ast.ClassDef) else self.node
        self.written = written(init, (LIB/f'{self.module}.py').read_text()) if init else {}

    def params(self):
        "`(name with stars, annotation, default)` of each parameter; '/' and '*' stand alone"
        out, seen_star = [], False
        for p in (self.sig.parameters.values() if self.sig else ()):
            if p.name in ('self', 'cls') and not out: continue
            star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
            if p.kind is p.KEYWORD_ONLY and not seen_star: out.append(('*', '', ''))
            seen_star |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
            anno, default = self.written.get(p.name, ('', ''))
            if not default and p.default is not p.empty: default = value(p.default)
            out.append((star + p.name, anno, default))
        return out

    def signature(self):
        "The call, on one line or with its parameters indented"
        args = [f'{n}: {a} = {d}' if a and d else f'{n}: {a}' if a else f'{n}={d}' if d else n for n, a, d in self.params()]
        if isinstance(self.node, ast.FunctionDef) and any(ast.unparse(d) == 'property' for d in self.node.decorator_list): return self.nm
        back = f' -> {ast.unparse(self.node.returns)}' if getattr(self.node, 'returns', None) else ''
        short = f'{self.nm}({", ".join(args)}){back}'
        if len(short) <= 74: return short
        lines = wrap(', '.join(a.replace(' ', '\0') for a in args), 72, initial_indent='    ', subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)
        return '\n'.join([f'{self.nm}(', *(o.replace('\0', ' ') for o in lines), f'){back}'])

    def described(self):
        "`(name, annotation, default, description)` of each parameter that is described: our own, and those that are passed on"
        try: docs = docments(self.sym, full=True)
        except Exception: docs = {}                                     # what is no function has none
        rows = [(n, a, d, t) for n, a, d in self.params() if (t := (docs.get(n.lstrip('*')) or {}).get('docment'))]
        own = [r for r in rows if r[0].lstrip('*') in self.written or not self.written]
        return own, [r for r in rows if r not in own]

    def table(self):
        "Parameters that are described, and what comes back; what is passed on to others is folded away"
        own, others = self.described()
        try: back = (docments(self.sym, full=True, returns=True).get('return') or {}).get('docment')
        except Exception: back = None
        if back: own.append(('returns', ast.unparse(r) if (r := getattr(self.node, 'returns', None)) else '', '', back))
        fold = f'<details><summary>{len(others)} more, passed on</summary>\n\n{rows(others)}\n\n</details>' if others else ''
        return '\n\n'.join(o for o in (rows(own) if own else '', fold) if o)

    def doc(self):
        "The name's own docstring, never one that it inherits"
        return (ast.get_docstring(self.node) or '') if self.node is not None else inspect.cleandoc(self.docs or '')

    def _repr_markdown_(self):
        line = f'#L{self.node.lineno}' if self.node is not None else ''
        name = self.nm.replace('_', r'\_')
        source = f'[source](/source/{self.module}.html{line}){{.source aria-label="Source of {self.nm}"}}' if self.module else ''
        parts = ['::: {.api}', f'{"#"*self.title_level} {name} {{#{self.nm.lower()}}}', source, f'```{{.python .signature}}\n{self.signature()}\n```',
                 self.doc(), self.table(), ':::']
        return '\n\n'.join(p for p in parts if p)
