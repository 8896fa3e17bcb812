"Is this tree fit to be released? Builds it, looks into what was built, installs the wheel into a fresh environment outside of the repository, imports it and runs the demo there"
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib

ROOT = Path(__file__).parents[1]


def package_version(root): return re.search(r'__version__ = "(.+?)"', (root/'fastai_ecg_pma'/'__init__.py').read_text())[1]


def version_problems(version, changelog, citation, tags=(), head_tags=()):
    "What is wrong with `version`, given the texts of the changelog and of CITATION.cff, all tags, and those of this commit"
    m = re.search(r'^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$', changelog, re.M)
    if not re.fullmatch(r'\d+\.\d+\.\d+', version): return [f'version {version!r} is not of the form 1.2.3']
    if not m: return ['CHANGELOG.md has no heading of the form `## 1.2.3 (unreleased)` or `## 1.2.3 (2000-12-31)`']
    out = [] if m[1] == version else [f'CHANGELOG.md begins with {m[1]}, the package is {version}']
    if not re.search(rf'^version: "?{re.escape(version)}"?$', citation, re.M): out.append(f'CITATION.cff does not say version: {version}')
    if f'v{version}' in tags and f'v{version}' not in head_tags: out.append(f'v{version} was released from another commit: raise __version__ in fastai_ecg_pma/__init__.py')
    if f'v{version}' in head_tags and m[2] == 'unreleased': out.append(f'this commit is tagged v{version}, but CHANGELOG.md calls it unreleased')
    return out + [f'this commit is tagged {t}, the package is {version}' for t in head_tags if re.match(r'v\d', t) and t != f'v{version}']


def wheel_problems(wheel, root):
    "What is wrong with a built wheel, beside the tree that it was built from"
    p = tomllib.loads((root/'pyproject.toml').read_text())['project']
    name, version = p['name'], package_version(root)
    with zipfile.ZipFile(wheel) as z: files = {n: z.read(n) for n in z.namelist()}
    info = f'{name}-{version}.dist-info/'
    want = {f'{name}/{f.relative_to(root/name).as_posix()}' for f in (root/name).rglob('*.py')}
    have = {n for n in files if not n.startswith(info)}
    meta = email.message_from_string(files.get(f'{info}METADATA', b'').decode())
    lines = lambda key: {re.sub(r'[\s"\'()]', '', v) for v in meta.get_all(key, [])}
    dependencies = {re.sub(r'\s', '', d) for d in p['dependencies']}
    out = [f'missing in the wheel: {n}' for n in sorted(want - have)] + [f'not of the package: {n}' for n in sorted(have - want)]
    out += [f'{k} is {meta[k]!r}, not {v!r}' for k, v in dict(Name=name, Version=version, Summary=p['description']).items() if meta[k] != v]
    out += [f'{k} is not in METADATA' for k in ('License-Expression', 'Requires-Python', 'Description-Content-Type') if not meta[k]]
    out += [f'not asked for in METADATA: {d}' for d in sorted(dependencies - lines('Requires-Dist'))]
    if 'text/markdown' not in (meta['Description-Content-Type'] or '') or (root/'README.md').read_text().strip() != (meta.get_payload() or '').strip(): out.append('the description is not README.md')
    entries = files.get(f'{info}entry_points.txt', b'').decode()
    out += [f'no entry point {e}' for e in [*(f'{k} = {v}' for k, v in p['scripts'].items()), f'{name} = {name}._modidx:d'] if e not in entries]
    return out + ([] if f'{info}licenses/LICENSE' in files else ['LICENSE is not in the wheel'])


def sdist_problems(sdist, root):
    "The source archive has to hold what a build needs"
    with tarfile.open(sdist) as t: names = {n.partition('/')[2] for n in t.getnames()}
    return [f'missing in the source archive: {n}' for n in ('pyproject.toml', 'README.md', 'LICENSE', 'fastai_ecg_pma/__init__.py', 'fastai_ecg_pma/all.py') if n not in names]


def run(*args, **kwargs):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
    if r.returncode: sys.exit(f'$ {" ".join(map(str, args))}\n{r.stdout[-3000:]}{r.stderr[-3000:]}')
    return r.stdout


def tracked_copy(root, to):
    "The files that git knows, as they are in the working tree"
    for name in run('git', 'ls-files', '-z', cwd=root).split('\0')[:-1]:
        if not (root/name).is_file(): sys.exit(f'{name} is known to git and not there')
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, to/name)
    return to


CODE = '''import sys, fastai_ecg_pma, pathlib
p = pathlib.Path(fastai_ecg_pma.__file__)
assert 'site-packages' in p.parts and pathlib.Path(sys.prefix) in p.parents, p
from fastai_ecg_pma.all import *
print(fastai_ecg_pma.__version__)'''


def try_wheel(wheel, root, tmp):
    "Install, import, run the demo: nothing of the repository is in reach"
    python, work = tmp/'venv'/'bin'/'python', tmp/'work'
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON') and k != 'VIRTUAL_ENV'} | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    def step(name, *args):
        t, out = time.perf_counter(), run(*args, cwd=work, env=env)
        print(f'{time.perf_counter()-t:5.0f} s  {name}', flush=True)
        return out
    step('a fresh environment', 'uv', 'venv', '-q', '--python', sys.executable, tmp/'venv')
    step('the wheel and what it asks for', 'uv', 'pip', 'install', '-q', '--compile-bytecode', '--python', python, '-c', root/'constraints.txt', wheel)
    step('requirements agree', 'uv', 'pip', 'check', '-q', '--python', python)
    said = step('imported', python, '-W', 'ignore', '-c', CODE)
    if said.strip() != package_version(root): sys.exit(f'the installed package says it is {said.strip()}, the tree {package_version(root)}')
    ecg_pma = tmp/'venv'/'bin'/'ecg-pma'
    step('demo, one epoch of each', ecg_pma, 'demo', 'out=demo', 'pretrain_epochs=1', 'frozen_epochs=1', 'tune_epochs=1')
    if not (work/'demo'/'scores.csv').exists(): sys.exit('the demo left no scores.csv')


def main(root=ROOT):
    git = lambda *a: run('git', *a, cwd=root).split('\n')[:-1]
    tagged = git('tag', '--points-at', 'HEAD')
    problems = version_problems(package_version(root), (root/'CHANGELOG.md').read_text(), (root/'CITATION.cff').read_text(), git('tag'), tagged)
    if dirty := git('status', '--porcelain'):
        if tagged: problems.append(f'{len(dirty)} files differ from the tagged commit')
        print(f'note: {len(dirty)} files differ from the last commit; what git knows of is built as it is')
    with tempfile.TemporaryDirectory(prefix='release-check-') as tmp:
        tmp, t = Path(tmp), time.perf_counter()
        run('uv', 'build', '-q', '--out-dir', tmp/'dist', tracked_copy(root, tmp/'src'))        # the source archive, and the wheel from it
        (wheel,), (sdist,) = (list((tmp/'dist').glob(f'*{s}')) for s in ('.whl', '.tar.gz'))
        print(f'{time.perf_counter()-t:5.0f} s  built {wheel.name} ({wheel.stat().st_size//1024} kB), {sdist.name} ({sdist.stat().st_size//1024} kB)', flush=True)
        problems += wheel_problems(wheel, root) + sdist_problems(sdist, root)
        if problems: sys.exit('not fit to be released:\n' + '\n'.join(f'- {p}' for p in problems))
        run('uv', 'tool', 'run', 'twine', 'check', '--strict', wheel, sdist)
        try_wheel(wheel, root, tmp)
    print(f'fastai_ecg_pma {package_version(root)} can be released')


if __name__ == '__main__': main()
