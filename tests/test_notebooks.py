"The notebooks are tests too; `make test` runs them by nbdev-test before, and leaves them out here"
import subprocess

import pytest


def test_notebooks(root, request):
    if request.config.getoption('--no-notebooks'): pytest.skip('run by nbdev-test')
    r = subprocess.run(['nbdev-test', '--n-workers', '2'], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
