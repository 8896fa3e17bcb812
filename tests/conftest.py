import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get('ECG_PMA_SHARED', ROOT.parent/'shared'))


def pytest_addoption(parser): parser.addoption('--no-notebooks', action='store_true', help='leave the notebooks to nbdev-test')


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def shared():
    "Recordings and reference arrays that are kept outside the project; tests that need them are skipped without"
    def find(name):
        if not (p := SHARED/name).exists(): pytest.skip(f'{name} is not beside the project (set ECG_PMA_SHARED)')
        return p
    return find
