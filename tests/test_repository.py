"What is generated is in step with what it is generated from, and the house keeps its order"
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest, yaml


def run(*args, cwd): return subprocess.run(args, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def copy(root, tmp_path_factory):
    "The repository's tracked shape, copied to where it can be rewritten"
    d = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'fastai_ecg_pma'): shutil.copytree(root/name, d/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked'))
    for name in ('pyproject.toml', 'README.md'): shutil.copy(root/name, d/name)
    return d


def contents(folder, pattern): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob(pattern)}


def test_exports_are_current(root, copy):
    r = run('nbdev-export', cwd=copy)
    assert r.returncode == 0, r.stderr
    assert contents(copy/'fastai_ecg_pma', '*.py') == contents(root/'fastai_ecg_pma', '*.py')


def test_notebooks_are_clean(root, copy):
    before = contents(root/'nbs', '*.ipynb')
    r = run('nbdev-clean', cwd=copy)
    assert r.returncode == 0, r.stderr
    after = contents(copy/'nbs', '*.ipynb')
    assert [n for n in before if before[n] != after[n]] == []


def test_notebooks_hold_no_machine_path(root):
    machine = ['site-packages', str(root), str(Path.home()), tempfile.gettempdir()]
    for p in (root/'nbs').rglob('*.ipynb'):
        nb = json.loads(p.read_text())
        cells = [c for c in nb['cells'] if c['cell_type'] == 'code']
        for o in (o for c in cells for o in c['outputs'] if 'data' in o): o['data'] = {k: v for k,v in o['data'].items() if not k.startswith('image/png')}    # base64 holds any word
        assert [m for m in machine if m in json.dumps(nb)] == [], p.name
        assert len({c['id'] for c in cells}) == len(cells)


@pytest.mark.parametrize('tool', ['readme', 'settings'])
def test_generated_files_are_current(root, tool):
    r = run(sys.executable, f'tools/{tool}.py', '--check', cwd=root)
    assert r.returncode == 0, r.stderr


def test_settings_mirror_is_noticed_when_stale(root, tmp_path):
    for name in ('tools', 'fastai_ecg_pma'): shutil.copytree(root/name, tmp_path/name)
    (tmp_path/'pyproject.toml').write_text((root/'pyproject.toml').read_text().replace('"rich>=13"', '"rich>=14"'))
    shutil.copy(root/'settings.ini', tmp_path)
    assert run(sys.executable, 'tools/settings.py', '--check', cwd=tmp_path).returncode == 1


def modules(root):
    "`{module: number of its notebook}`"
    out = {}
    for p in (root/'nbs').glob('[0-9]*.ipynb'):
        if m := re.search(r'#\| default_exp (\w+)', p.read_text()): out[m[1]] = int(p.name.split('_')[0])
    return out


def imports(path):
    "Modules of this package that a generated module imports, and whether any import is a star"
    tree = ast.parse(path.read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {n.module for n in froms if n.level and n.module}, [n.module for n in froms if any(a.name == '*' for a in n.names)]


def test_modules_import_only_from_lower_numbers(root):
    number = modules(root)
    assert {p.stem for p in (root/'fastai_ecg_pma').glob('[a-z]*.py')} == set(number)
    for m, n in number.items():
        used, stars = imports(root/'fastai_ecg_pma'/f'{m}.py')
        assert not stars, (m, stars)
        assert all(number[u] < n for u in used), (m, used)


def test_import_is_light(root):
    code = 'import sys, fastai_ecg_pma as p; print(p.__version__, *sorted({"torch", "numpy", "fastai", "tsai"} & set(sys.modules)))'
    r = run(sys.executable, '-c', code, cwd=root)
    assert len(r.stdout.split()) == 1 and not r.stderr          # the version, and none of the heavy ones


def test_star_import_gives_the_public_names(root):
    code = 'from fastai_ecg_pma.all import *; print(pma_learner.__module__, "np" in dir(), "torch" in dir())'
    r = run(sys.executable, '-W', 'ignore', '-c', code, cwd=root)
    assert r.stdout.split() == ['fastai_ecg_pma.learner', 'False', 'False'], r.stderr

def figures(cell): return sum('image/png' in o.get('data', {}) for o in cell['outputs'])

def alt_texts(cell):
    "Texts of `#| fig-alt: …`: one, or a YAML list of them"
    lines = [l.removeprefix('#|') for l in ''.join(cell['source']).splitlines() if l.startswith('#|')]
    texts = [yaml.safe_load(l)['fig-alt'] for l in lines if l.strip().startswith('fig-alt:')]
    return [t for o in texts for t in (o if isinstance(o, list) else [o])]

def is_shown(cell): return not re.search(r'^#\|\s*(hide|hide_output|hide-output|output:\s*false|include:\s*false)\s*$', ''.join(cell['source']), re.M)

def without_alt(cells):
    "Ids of cells whose figures and texts are not as many, or whose texts say too little to stand for a picture"
    cells = [c for c in cells if c['cell_type'] == 'code' and is_shown(c)]
    return [c['id'] for c in cells if len(alt_texts(c)) != figures(c) or not all(isinstance(t, str) and len(t.split()) > 5 for t in alt_texts(c))]

def test_every_figure_says_what_is_seen(root):
    missing = {str(p.relative_to(root)): ids for p in (root/'nbs').rglob('*.ipynb') if (ids := without_alt(json.loads(p.read_text())['cells']))}
    assert missing == {}

@pytest.mark.parametrize('source,n,fine', [
    ('plot()', 1, False), ('#| fig-alt: A plot.\nplot()', 1, False), ('#| fig-alt: Two lines that rise and then meet.\nplot()', 1, True), ('#| fig-alt: Two lines that rise and then meet.\nplot()', 2, False),
    ('#| fig-alt: ["One line that rises to the end.", "Another: it falls from the start."]\nplot()', 2, True), ('#| fig-alt: Two lines that rise and then meet.\nx = 1', 0, False),
    ('#| hide\nplot()', 1, True), ('#| output: false\nplot()', 1, True)])
def test_missing_alt_texts_are_noticed(source, n, fine):
    cell = dict(cell_type='code', id='a', source=source, outputs=[dict(data={'image/png': ''})]*n)
    assert (without_alt([cell]) == []) == fine


def the_house(root): return (root/'CONTRIBUTING.md').read_text().split('## The house')[1].split('\n## ')[0]

def on_the_map(house): return re.findall(r'`(\d\d_\w+)`', '\n'.join(l.split('|')[2] for l in house.splitlines() if l.startswith('| ')))

def test_every_notebook_is_on_the_map_once(root):
    assert sorted(on_the_map(the_house(root))) == sorted(p.stem for p in (root/'nbs').glob('[0-9]*.ipynb'))


def named_files(text): return {n for n in re.findall(r'(?:nbs|tests|tools|fastai_ecg_pma|experiments|benchmarks)/[\w./]*', text)}

PAGES = ('CONTRIBUTING.md', 'README.md', '.github/pull_request_template.md', '.github/ISSUE_TEMPLATE/bug.yml', '.github/ISSUE_TEMPLATE/proposal.yml')

@pytest.mark.parametrize('page', PAGES)
def test_files_named_in_the_pages_are_there(root, page):
    assert {n for n in named_files((root/page).read_text()) if not (root/n.rstrip('.')).exists()} == set()


def targets(makefile): return {t for line in re.findall(r'^\.PHONY:(.*)$', makefile, re.M) for t in line.split()}

def explained(makefile): return {m[1]: m[2] for m in re.finditer(r'^([a-z-]+):.*## (.+)$', makefile, re.M)}

def test_every_target_explains_itself(root):
    makefile = (root/'Makefile').read_text()
    assert targets(makefile) == set(explained(makefile)) == set(re.findall(r'^([a-z-]+):', makefile, re.M))
    assert set(explained(makefile + '\nquiet:\n\ttrue\n')) != set(re.findall(r'^([a-z-]+):', makefile + '\nquiet:\n\ttrue\n', re.M))
    r = run('make', '-s', '--no-print-directory', 'help', cwd=root)
    assert dict(re.split(r'\s+', l, maxsplit=1) for l in r.stdout.splitlines()) == explained(makefile)


@pytest.mark.parametrize('page', [*PAGES, '.ci/run'])
def test_targets_named_in_the_pages_are_there(root, page):
    named = {t for t in re.findall(r'(?:^|`)make ([a-z-]+)\b', (root/page).read_text(), re.M)}
    assert named - targets((root/'Makefile').read_text()) == set()


def test_issue_forms_are_what_the_host_reads(root):
    "Ids are unique, required parts are there, and patients' data are warned of in each"
    for p in (root/'.github'/'ISSUE_TEMPLATE').glob('*.yml'):
        form = yaml.safe_load(p.read_text())
        if p.name == 'config.yml': continue
        assert {'name', 'description', 'body'} <= set(form), p.name
        ids = [b['id'] for b in form['body'] if 'id' in b]
        assert len(ids) == len(set(ids)) == len([b for b in form['body'] if b['type'] != 'markdown'])
        assert any(b.get('validations', {}).get('required') or any(o.get('required') for o in b['attributes'].get('options', [])) or p.name == 'proposal.yml' for b in form['body'])
        assert "patients' data" in p.read_text().lower(), p.name


def test_title_cells_hold_title_and_subtitle_alone(root):
    "nbdev takes both out of the cell for the head of the page, and drops what else is in it"
    for p in (root/'nbs').rglob('*.ipynb'):
        title, *more = [l for l in ''.join(json.loads(p.read_text())['cells'][0]['source']).splitlines() if l.strip()]
        assert title.startswith('# ') and more and all(l.startswith('> ') for l in more), p.name


def test_definitions_stand_below_a_heading(root):
    "On the page a definition is a heading of the third order: one of the second comes first"
    for p in (root/'nbs').glob('[0-9]*.ipynb'):
        below = False
        for c in json.loads(p.read_text())['cells']:
            s = ''.join(c['source'])
            below = below or c['cell_type'] == 'markdown' and re.search(r'^## ', s, re.M) is not None
            assert below or not (s.startswith('#| export') and re.search(r'^(def|class) [a-zA-Z]', s, re.M)), p.name
