"The release check notices what is wrong: with the version, with a built wheel, with a source archive. The whole of it is `make release-check`"
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest


@pytest.fixture(scope='module')
def check(root):
    spec = importlib.util.spec_from_file_location('release_check', root/'tools'/'release_check.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m


LOG, CITE = '# Changelog\n\n## 1.2.3 (2026-01-31)\n\n- This.\n\n## 1.2.2 (2025-01-31)\n', 'version: 1.2.3\n'

@pytest.mark.parametrize('version,log,cite,tags,here,says', [
    ('1.2.3', LOG, CITE, ['v1.2.2'], [], None), ('1.2.3', LOG, CITE, ['v1.2.2', 'v1.2.3'], ['v1.2.3'], None), ('1.2.3', LOG.replace('2026-01-31', 'unreleased'), CITE, [], [], None),
    ('1.2.3', LOG, CITE, ['v1.2.3'], ['newest'], 'released from another commit'), ('1.2.3', LOG.replace('2026-01-31', 'unreleased'), CITE, ['v1.2.3'], ['v1.2.3'], 'calls it unreleased'),
    ('1.2.4', LOG, 'version: 1.2.4', [], [], 'begins with 1.2.3'), ('1.2.3', LOG, CITE.replace('3', '2'), [], [], 'CITATION.cff'), ('1.2.3', LOG, CITE, ['v1.2.4'], ['v1.2.4'], 'tagged v1.2.4'),
    ('1.2', LOG, CITE, [], [], 'form 1.2.3'), ('1.2.3', '# Changelog\n\n## 1.2.3\n', CITE, [], [], 'no heading')])
def test_versions_agree(check, version, log, cite, tags, here, says):
    out = check.version_problems(version, log, cite, tags, here)
    assert out == [] if says is None else len(out) == 1 and says in out[0], out


def test_versions_of_this_tree_agree(check, root):
    assert check.version_problems(check.package_version(root), (root/'CHANGELOG.md').read_text(), (root/'CITATION.cff').read_text()) == []


@pytest.fixture(scope='module')
def wheel(check, root, tmp_path_factory):
    "Built here, by setuptools, without an environment of its own"
    tmp = tmp_path_factory.mktemp('wheel')
    for n in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(root/n, tmp/n)
    shutil.copytree(root/'fastai_ecg_pma', tmp/'fastai_ecg_pma', ignore=shutil.ignore_patterns('__pycache__'))
    r = subprocess.run([sys.executable, '-c', "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"], cwd=tmp, capture_output=True, text=True)
    if r.returncode: pytest.skip('no setuptools here: ' + r.stderr[-200:])
    return next((tmp/'dist').glob('*.whl'))

def changed(wheel, to, change):
    "A copy of `wheel` in which `change(name, bytes)` gives the bytes of a file, or None to leave it out"
    with zipfile.ZipFile(wheel) as z: files = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(to, 'w') as z:
        for n, b in files.items():
            if (b := change(n, b)) is not None: z.writestr(n, b)
    return to

def test_the_wheel_is_what_it_should_be(check, root, wheel): assert check.wheel_problems(wheel, root) == []

@pytest.mark.parametrize('change,says', [
    (lambda n, b: None if n.endswith('/gate.py') else b, 'missing in the wheel: fastai_ecg_pma/gate.py'),
    (lambda n, b: None if n.endswith('LICENSE') else b, 'LICENSE is not in the wheel'),
    (lambda n, b: b.replace(b'ecg-pma = ', b'ecg = ') if n.endswith('entry_points.txt') else b, 'no entry point ecg-pma'),
    (lambda n, b: b.replace(b'Requires-Dist: scipy', b'X-Dist: scipy') if n.endswith('METADATA') else b, 'not asked for in METADATA: scipy'),
    (lambda n, b: b.replace(b'# fastai_ecg_pma', b'# Something') if n.endswith('METADATA') else b, 'the description is not README.md'),
    (lambda n, b: b.replace(b'License-Expression', b'X-License') if n.endswith('METADATA') else b, 'License-Expression is not in METADATA')])
def test_a_wrong_wheel_is_noticed(check, root, wheel, tmp_path, change, says):
    out = check.wheel_problems(changed(wheel, tmp_path/'w.whl', change), root)
    assert len(out) == 1 and says in out[0], out

def test_what_does_not_belong_into_the_wheel_is_noticed(check, root, wheel, tmp_path):
    to = changed(wheel, tmp_path/'w.whl', lambda n, b: b)
    with zipfile.ZipFile(to, 'a') as z: z.writestr('tests/test_x.py', ''), z.writestr('nbs/00_synth.ipynb', '')
    assert check.wheel_problems(to, root) == ['not of the package: nbs/00_synth.ipynb', 'not of the package: tests/test_x.py']


def test_a_source_archive_without_its_licence_is_noticed(check, root, tmp_path):
    with tarfile.open(tmp_path/'s.tar.gz', 'w:gz') as t:
        for n in ('pyproject.toml', 'README.md', 'fastai_ecg_pma/__init__.py', 'fastai_ecg_pma/all.py'): t.addfile(tarfile.TarInfo(f'x-1/{n}'), io.BytesIO())
    assert check.sdist_problems(tmp_path/'s.tar.gz', root) == ['missing in the source archive: LICENSE']
