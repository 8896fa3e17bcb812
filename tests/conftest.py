import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get('ECG_PMA_SHARED', Path(__file__).parents[2]/'shared'))

@pytest.fixture(scope='session')
def shared():
    "Recordings and reference arrays that are kept outside the project; tests that need them are skipped without"
    def find(name):
        if not (p := SHARED/name).exists(): pytest.skip(f'{name} is not beside the project (set ECG_PMA_SHARED)')
        return p
    return find
