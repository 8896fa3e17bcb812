"The function behind a web server (nbs/tutorials/08_deploy.ipynb) against what an upload can hold, and a model that several threads ask"
import ast
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastai_ecg_pma.calibrate import Calibration
from fastai_ecg_pma.thresholds import Thresholds
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.export import export_onnx, onnx_runner
from fastai_ecg_pma.gate import LeadPMA
from fastai_ecg_pma.layers import mean_leads
from fastai_ecg_pma.learner import pma_learner
from fastai_ecg_pma.decide import predictor
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.synth import simulate_ecg, write_record

@pytest.fixture(scope='module')
def page(root):
    "The names and functions of the page, without running the rest of it"
    nb = json.loads((root/'nbs/tutorials/08_deploy.ipynb').read_text())
    code = [n for c in nb['cells'] if c['cell_type'] == 'code' for n in ast.parse(''.join(c['source'])).body]
    constant = lambda n: isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id.isupper()
    names = {}
    exec(compile(ast.Module([n for n in code if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef)) or constant(n)], []), 'page', 'exec'), names)
    return names

def model_of(n_layers=2, d=16, **kwargs):
    rng = np.random.default_rng(0)
    dls = ecg_dls(rng.normal(size=(12,12,200)).astype(np.float32), rng.integers(0, 2, (12,3)).astype(np.float32), list('abc'), np.arange(12) >= 8, Preprocess(seq_len=200, stride=200), bs=4)
    learn = pma_learner(dls, make_vit(dls, ps=50, d=d, n_layers=n_layers, n_heads=2), seed=0, **kwargs)
    for p in learn.model.head.parameters(): torch.nn.init.normal_(p, std=.3)
    return predictor(learn, score=False)

@pytest.fixture(scope='module')
def model(): return model_of()

@pytest.fixture
def upload(tmp_path):
    write_record(simulate_ecg(rng=0, seconds=6), tmp_path/'in'/'rec-1', 100)
    return {f.name: f.read_bytes() for f in (tmp_path/'in').iterdir()}

def test_answers_what_predict_says(page, model, upload, tmp_path):
    m = replace(model, calibration=Calibration('platt', list('abc'), a=[1,2,3], b=[0,.5,1]), thresholds=Thresholds(tuple('abc'), (.9, .5, np.inf)))
    got, want = json.loads(json.dumps(page['answer'](upload, m), allow_nan=False)), m.predict(tmp_path/'in'/'rec-1')
    assert got == dict(record='rec-1', probability=want.probability.to_dict(), positive=want.positive.to_dict(), gate=want.gate.tolist(), warnings=[], windows=3, weights=None)

def test_answers_of_other_read_outs(page, upload):
    got = page['answer'](upload, model_of(readout=partial(LeadPMA, hidden=(8,8)), pool=mean_leads))
    assert np.shape(got['gate']) == (2, 12) and got['positive'] is None
    json.dumps(got, allow_nan=False)

def test_what_is_odd_is_said(page, model, tmp_path):
    x = simulate_ecg(rng=0, seconds=6); x[7] = 0
    write_record(x, tmp_path/'odd', 100)
    assert len(page['answer']({f.name: f.read_bytes() for f in tmp_path.iterdir()}, model)['warnings']) == 1

@pytest.mark.parametrize('name', ['../x.dat', '..\\x.dat', '/tmp/x.dat', 'a/b.dat', '..', '.hea', 'x.hea\n', 'x.dat\0', '', None, 'x.exe', 'x.DAT', 'C:x.dat', 'a'*81+'.dat', 'ä.dat', 'x.dat.hea', '~.dat'])
def test_names_are_refused_and_nothing_is_written(page, model, upload, name, monkeypatch):
    monkeypatch.setattr(Path, 'write_bytes', lambda *a: pytest.fail('written'))
    with pytest.raises(ValueError, match='is no name of a file here'): page['answer']({**upload, name: b''}, model)

def test_sizes_and_headers_are_counted(page, model, upload):
    with pytest.raises(ValueError, match='bytes are more than'): page['answer']({**upload, 'x.dat': bytes(page['MAX_BYTES'])}, model)
    with pytest.raises(ValueError, match='0 headers'): page['answer']({k: v for k,v in upload.items() if k.endswith('.dat')}, model)
    with pytest.raises(ValueError, match='2 headers'): page['answer']({**upload, 'x.hea': upload['rec-1.hea']}, model)
    with pytest.raises(ValueError, match='0 headers'): page['answer']({}, model)

@pytest.mark.parametrize('change', [lambda h: h.replace('rec-1.dat', '../in/rec-1.dat'), lambda h: h.replace('rec-1.dat', '/etc/passwd'), lambda h: h.replace('rec-1.dat', 'other.dat'), lambda h: h.replace(' 600', ' 99999999999'),
                                    lambda h: h.replace('rec-1 12', 'rec-1/3 12'), lambda h: h.replace(' 100 ', ' 0 '), lambda h: h.replace('mV', 'nonsense'), lambda h: '', lambda h: h[:200], lambda h: '\0'*100])
def test_bad_headers_give_a_message_without_a_path(page, model, upload, change, tmp_path):
    header = upload['rec-1.hea'].decode()
    assert change(header) != header
    with pytest.raises(ValueError) as e: page['answer']({**upload, 'rec-1.hea': change(header).encode()}, model)
    assert tempfile.gettempdir() not in str(e.value) and str(tmp_path) not in str(e.value) and 'rec-1' in str(e.value)

def test_random_bytes_give_a_message(page, model, upload):
    rng, header = np.random.default_rng(0), bytearray(upload['rec-1.hea'])
    for _ in range(40):
        h = bytearray(header)
        for i in rng.integers(0, len(h), 3): h[i] = rng.integers(0, 256)
        try: json.dumps(page['answer']({**upload, 'rec-1.hea': bytes(h)}, model), allow_nan=False)
        except ValueError as e: assert tempfile.gettempdir() not in str(e)

def test_nothing_stays(page, model, upload, monkeypatch, tmp_path):
    (tmp_path/'t').mkdir(); monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'t'))
    page['answer'](upload, model)
    with pytest.raises(ValueError): page['answer']({**upload, 'rec-1.hea': b'x'}, model)
    assert list((tmp_path/'t').iterdir()) == []

@pytest.mark.parametrize('kind', ['predictor', 'onnxruntime'])
def test_threads_get_their_own_answers(kind, tmp_path):
    "With the threads changing places as often as they can"
    m, rng = model_of(4, 32), torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 12, 200, generator=rng) for _ in range(20)]
    want = [m._outputs(x) for x in xs]
    f, was = m._outputs if kind == 'predictor' else onnx_runner(export_onnx(m, tmp_path/'m.onnx')), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool: got = list(pool.map(f, xs*5))
    finally: sys.setswitchinterval(was)
    for g, w in zip(got, want*5): np.testing.assert_allclose(g[0], w[0], atol=1e-5); np.testing.assert_allclose(g[1], w[1], atol=1e-5)
    assert np.ptp([w[0] for w in want], axis=0).min() > 1e-3
