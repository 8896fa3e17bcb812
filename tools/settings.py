"Write settings.ini, a mirror of pyproject.toml in nbdev 2's keys; `--check` fails if it is out of step"
import re
import sys
from pathlib import Path

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib

ROOT = Path(__file__).parents[1]


def render():
    "The text of settings.ini"
    t = tomllib.loads((ROOT/'pyproject.toml').read_text())
    p, n = t['project'], t['tool']['nbdev']
    version = re.search(r'__version__ = "(.+?)"', (ROOT/p['name']/'__init__.py').read_text())[1]
    keys = dict(repo=p['name'], lib_name=p['name'], lib_path=p['name'], nbs_path='nbs', doc_path='_docs', title=n['title'], description=p['description'],
                author=p['authors'][0]['name'], license='apache2', version=version, min_python=p['requires-python'].removeprefix('>='),
                keywords=' '.join(p['keywords']), requirements=' '.join(p['dependencies']), dev_requirements=' '.join(p['optional-dependencies']['dev']),
                tst_flags=n['tst_flags'], console_scripts=' '.join(f'{k}={v}' for k, v in p['scripts'].items()))
    head = '# Generated from pyproject.toml by `make settings`: edit that, not this. nbdev 3 does not read this file.\n'
    return head + '[DEFAULT]\n' + ''.join(f'{k} = {v}\n' for k, v in keys.items())


if __name__ == '__main__':
    path = ROOT/'settings.ini'
    if '--check' in sys.argv:
        if not path.exists() or path.read_text() != render(): sys.exit('settings.ini is out of step with pyproject.toml: run `make settings`')
    else: path.write_text(render())
