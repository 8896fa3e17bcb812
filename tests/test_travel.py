"""Weights that travel: to another process, by every read-out and encoder, and from strangers: pickles, tensors of any size, thousands of damaged files"""
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

warnings.filterwarnings('ignore', '.*torch.jit.script')
import numpy as np, pandas as pd, pytest, torch
from torch import nn

from fastai_ecg_pma.aggregate import PPA, Concat, Fuse, GroupMeans, Last, LastMean, Layer, OwnNorm, SharedNorm, SignedStatic, Static, class_head, linear_head
from fastai_ecg_pma.attend import AttentionPool, Attentive
from fastai_ecg_pma.compare import PMA_DEFAULT
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.gate import PMA, ClassPMA, LeadPMA, top_k
from fastai_ecg_pma.gates import prune
from fastai_ecg_pma.layers import mean_leads
from fastai_ecg_pma.learner import by_record, pma_learner, predict_record, row_scores
from fastai_ecg_pma.predict import calibrate, decide, load_pma, predictor, save_pma
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.synth import PTBXL_LEADS, simulate_ecg, synth_ptbxl, write_record
from fastai_ecg_pma.windows import InMemory, EcgArray

PATCH = dict(ps=50, d=32, n_layers=3, n_heads=1)


@pytest.fixture(scope='module')
def d(tmp_path_factory): return tmp_path_factory.mktemp('travel')

@pytest.fixture(scope='module')
def dls(d): return ptbxl_dls(synth_ptbxl(d/'ecgs', n=120), prep=Preprocess(fs=100, seq_len=500, stride=500), bs=16)

def fitted(dls, encoder=None, readout=partial(PMA, hidden=(16,8)), epochs=1, **kwargs):
    learn = pma_learner(dls, encoder or make_vit(dls, **PATCH), readout, seed=0, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 3e-3)
    return learn

@pytest.fixture(scope='module')
def learn(dls):
    learn = fitted(dls, epochs=5)
    calibrate(learn, ds_idx=0); decide(learn, 0, sensitivity=.9)          # of eleven validation records a fit would be flat
    return learn

@pytest.fixture(scope='module')
def folder(d, learn): return save_pma(learn, d/'model', title='made up', license='apache-2.0')

@pytest.fixture(scope='module')
def valid_paths(dls):
    rows = np.asarray(dls.valid.dataset.split_idxs)
    return [str(dls.paths[rows[i]]) for i in np.unique(dls.record[rows], return_index=True)[1]]


# ---- to another process

ELSEWHERE = '''
import sys, json
from fastai_ecg_pma.predict import load_pma
import torch
torch.set_num_threads(int(sys.argv[1]))
many = load_pma(sys.argv[2]).predict(json.loads(sys.argv[3]))
out = {k: many[k].to_numpy(dtype=float).tolist() for k in ('probability', 'positive', 'gate')}
print(json.dumps(dict(out, labels=list(many.probability.columns), layers=list(many.gate.columns), error=many.record.error.tolist(), threads=torch.get_num_threads(), modules=sorted(sys.modules))))
'''

@pytest.mark.parametrize('threads', [1, 4])
def test_another_process_says_what_validation_said(threads, root, tmp_path, learn, dls, folder, valid_paths):
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'} | dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(root), PYTHONHASHSEED=str(threads))
    r = subprocess.run([sys.executable, '-c', ELSEWHERE, str(threads), str(folder), json.dumps(valid_paths)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert r.returncode == 0, r.stderr[-3000:]
    got = json.loads(r.stdout.splitlines()[-1])
    p, y, _ = by_record(*row_scores(learn), dls)
    want = learn.calibration(np.float64(p))
    assert got['threads'] == threads and got['error'] == ['']*len(p) and 'test_travel' not in got['modules']
    assert got['labels'] == list(map(str, dls.vocab))
    np.testing.assert_allclose(got['probability'], want, rtol=0, atol=1e-6)
    assert np.ptp(want, 0).min() > 1e-3 and 0 < np.mean(got['positive']) < 1                     # there is something to say
    np.testing.assert_array_equal(np.array(got['positive'], bool), want >= np.array(learn.thresholds.at))
    np.testing.assert_allclose(got['gate'], gates_by_record(learn, dls), rtol=0, atol=1e-6)
    assert got['layers'] == [1, 2, 3]

def gates_by_record(learn, dls):
    "Mean weights of layers over a record's windows, written another way"
    with torch.no_grad(): w = learn.model.eval().weights(torch.as_tensor(np.asarray(dls.valid.dataset[:][0])))
    return pd.DataFrame(w.numpy()).groupby(dls.record[np.asarray(dls.valid.dataset.split_idxs)]).mean().to_numpy()
