"The tutorials keep their form: what they do not run would run, their links lead somewhere, their pictures are small and described"
import ast
import base64
import builtins
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT/'nbs/tutorials').glob('*.ipynb'))
page = pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)

def cells(path, kind): return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]

@pytest.fixture(scope='module')
def public():
    import fastai_ecg_pma.all as public
    return public

def misfits(code, public):
    "What is wrong with the calls of public functions in `code`: an unknown argument, or one too many"
    for n in ast.walk(ast.parse(code)):
        if not isinstance(n, ast.Call) or not isinstance(n.func, ast.Name) or (f := getattr(public, n.func.id, None)) is None: continue
        try: inspect.signature(f).bind_partial(*n.args, **{k.arg: k.value for k in n.keywords if k.arg})
        except TypeError as e: yield f'{n.func.id}: {e}'

def unknown(code, public):
    "Names in `code` that it gets from nowhere: neither from imports and lines of its own, nor from this package"
    tree = ast.parse(code)
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {a.asname or a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    made |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} | {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in n.args} | {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)}
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - made - set(dir(public)) - set(dir(builtins))

def fences(path): return [m for s in cells(path, 'markdown') for m in re.findall(r'```python\n(.*?)```', s, re.S)]

@page
def test_code_that_is_not_run_calls_what_there_is(path, public):
    run = '\n'.join(re.sub(r'^[%!].*', '', s, flags=re.M) for s in cells(path, 'code'))
    there = {n.id for n in ast.walk(ast.parse(run)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {'np', 'pd', 'answer', 'dls', 'my_model'}
    assert fences(path)
    for code in fences(path):
        assert list(misfits(code, public)) == []
        assert unknown(code, public) - there == set(), code

def test_a_wrong_call_is_noticed(public):
    assert list(misfits('ptbxl_table("path", tsk=1)', public)) and list(misfits('evaluate(learn, 1, 2)', public)) and not list(misfits('evaluate(learn, 1, n=200)', public))
    assert unknown('lern.fit(1)\nlearn = pma_learner(dls)', public) == {'lern', 'dls'}

@page
def test_form(path):
    text = cells(path, 'markdown')
    assert re.match(r'# .+\n\n> .+', text[0]) and 'For you if' in '\n'.join(text[:2])
    assert all(re.search(rf'^## {h}$', '\n'.join(text), re.M) for h in ('With your own records', 'Next'))
    assert 'medical device' in '\n'.join(text)

@page
def test_links_lead_somewhere(path):
    links = [l for s in cells(path, 'markdown') for l in re.findall(r'\]\(([^)\s]+)\)', s) if not l.startswith('http')]
    assert links and [l for l in links if not (path.parent/l.split('#')[0]).is_file()] == []

@page
def test_pictures_are_small_and_described(path):
    for c in json.loads(path.read_text())['cells']:
        for o in c.get('outputs', []):
            if png := o.get('data', {}).get('image/png'):
                assert re.search(r'^#\| fig-alt: ".{30,}"$', ''.join(c['source']), re.M), ''.join(c['source'])
                assert len(base64.b64decode(''.join(png))) < 60_000
