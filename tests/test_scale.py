"Two processes (gloo) against one: the script of the page as it is started, then what it does not show"
import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastai_ecg_pma.synth import synth_ptbxl

WORKER = Path(__file__).with_name('scale_worker.py')


@pytest.fixture(scope='module')
def script(root, tmp_path_factory):
    "`pretrain.py` as nbs/39_scale.ipynb shows it"
    cells = json.loads((root/'nbs'/'39_scale.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    found = re.findall(r'```python\n(import sys\n.*?)```', text, re.S)
    assert len(found) == 1
    p = tmp_path_factory.mktemp('script')/'pretrain.py'
    p.write_text(found[0])
    return p


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "37 validation records: a multiple of neither the processes nor the batch"
    return synth_ptbxl(tmp_path_factory.mktemp('ecgs')/'ecgs', n=90)
