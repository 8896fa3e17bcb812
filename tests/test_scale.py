"""Two processes (gloo) against one: the script of the page as it is started, then what it does not show

This file is the script of the processes, too: `torchrun tests/test_scale.py FOLDER OUT SCRIPT`.
"""
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore', '.*torch.jit.script')
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.training import GradientClip
from fastai.metrics import accuracy_multi
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib

from fastai_ecg_pma.aggregate import Static, linear_head
from fastai_ecg_pma.learner import pma_learner, pretrain_learner
from fastai_ecg_pma.metrics import MacroAUROC
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.scale import Accumulate, ShareDL
from fastai_ecg_pma.synth import synth_ptbxl
from fastai_ecg_pma.vit1d import ViT1d

N_RANKS = 2


# ---- what each process does; `bs` is of all of them together

def n_ranks(): return num_distrib() or 1

def small():
    torch.manual_seed(0)
    return ViT1d(1000, 50, d=32, n_layers=2, n_heads=1)

def curve(learn): return dict(values=[[float(v) for v in row] for row in learn.recorder.values], losses=[float(l) for l in learn.recorder.losses])

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def the_script(folder, out, script):
    "The page's script, started as a shell would"
    was, sys.argv = sys.argv, [script, str(folder), str(out), '2', '16']
    try: learn = runpy.run_path(script, run_name='__main__')['learn']
    finally: sys.argv = was
    return dict(curve(learn), weights=weights(learn))

def accumulated(folder, bs=4, n_acc=12):
    "Pretraining without a shuffle or a drop, steps of accumulated and clipped gradients, the last validation's predictions fetched while it runs"
    dls = ptbxl_dls(folder, task=None, bs=bs//n_ranks(), shuffle_train=False, drop_last=False)
    fetch = FetchPredsCallback()
    learn = pretrain_learner(dls, small(), seed=1, opt_func=partial(SGD, mom=.9), cbs=[Accumulate(n_acc//n_ranks()), GradientClip(.5), fetch])
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2, .1)
    pred,(patches,mask) = fetch.preds
    return dict(curve(learn), weights=weights(learn), patches=patches, mask=mask, pred=pred)

def read_out(folder, out, bs=4):
    "A read-out with metrics of both kinds, validated and asked for predictions, outside of `fit` too"
    learn = pma_learner(ptbxl_dls(folder, bs=bs//n_ranks()), small(), Static, head=linear_head, seed=1, 
                        metrics=[MacroAUROC(), accuracy_multi], path=Path(out)/f'rank{rank_distrib()}', opt_func=partial(SGD, mom=.9))
    learn.unfreeze()
    before = list(learn.dls.loaders), [type(c) for c in learn.cbs], learn.loss_func
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
        learn.fit(2, .1)
        got = dict(curve(learn), weights=weights(learn), validate=list(map(float, learn.validate())), preds=learn.get_preds(), losses_of=learn.get_preds(with_loss=True)[2])
        learn.save('model')
        learn.export()
    assert (list(learn.dls.loaders), learn.loss_func) == (before[0], before[2])
    return got

def all_of_it(folder, out, script): return dict(the_script=the_script(folder, out, script), accumulated=accumulated(folder), read_out=read_out(folder, out))

if __name__ == '__main__':
    folder, out, script = sys.argv[1:]
    torch.save(all_of_it(folder, out, script), f'{out}/results{rank_distrib()}.pt')
    torch.distributed.destroy_process_group()


# ---- the comparison

@pytest.fixture(scope='module')
def script(root, tmp_path_factory):
    "`pretrain.py` as nbs/39_scale.ipynb shows it"
    cells = json.loads((root/'nbs'/'39_scale.ipynb').read_text())['cells']
    found = re.findall(r'```python\n(import sys, torch\n.*?)```', '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), re.S)
    assert len(found) == 1
    p = tmp_path_factory.mktemp('script')/'pretrain.py'
    code, end = found[0].split('if num_distrib() > 1: torch.distributed.destroy_process_group()')          # here the processes have more to do
    assert end.strip().startswith('#')
    p.write_text(code)
    return str(p)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return synth_ptbxl(tmp_path_factory.mktemp('ecgs')/'ecgs', n=120)       # 98 to train, 11 to validate

@pytest.fixture(scope='module')
def one(folder, script, tmp_path_factory): return all_of_it(folder, tmp_path_factory.mktemp('one'), script)

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('several')

@pytest.fixture(scope='module')
def ranks(root, folder, script, out):
    "What each of the processes got"
    env = dict(os.environ, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=f'{root}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(N_RANKS), __file__, str(folder), str(out), script]
    r = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stderr[-6000:]
    return [dict(torch.load(out/f'results{i}.pt', weights_only=False), printed=r.stdout) for i in range(N_RANKS)]

def near(a, b, atol=1e-5): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)

PARTS = 'the_script', 'accumulated', 'read_out'

@pytest.mark.parametrize('part', PARTS)
def test_curves_are_those_of_one_process(one, ranks, part):
    a = one[part]
    assert np.ptp(np.asarray(a['losses'])) > 1e-2                                 # something is learned
    for r in ranks:
        near(r[part]['losses'], a['losses'])
        near(r[part]['values'], a['values'])

@pytest.mark.parametrize('part', PARTS)
def test_weights_are_those_of_one_process(one, ranks, part):
    a, (b,c) = one[part]['weights'], (r[part]['weights'] for r in ranks)
    assert list(a) == list(b) == list(c)
    for k in a:
        assert torch.equal(b[k], c[k])
        near(a[k], b[k], 1e-4)

def test_masks_belong_to_the_records(one, ranks):
    a = one['accumulated']
    for r in ranks:
        assert torch.equal(r['accumulated']['patches'], a['patches']) and torch.equal(r['accumulated']['mask'], a['mask'])
        near(r['accumulated']['pred'], a['pred'], 1e-3)

def test_validate_and_get_preds(one, ranks):
    a = one['read_out']
    near(a['validate'], a['values'][-1][1:], 1e-6)
    for r in (r['read_out'] for r in ranks):
        near(r['validate'], a['validate'])
        assert len(r['preds'][0]) == 11 and torch.equal(r['preds'][1], a['preds'][1])
        near(r['preds'][0], a['preds'][0])
        near(r['losses_of'], a['losses_of'])

def test_only_the_first_writes_and_prints(ranks, out):
    assert sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file()) == [
        'encoder/config.json', 'encoder/model.safetensors', 'models/pretrained.pth', 'rank0/export.pkl', 'rank0/models/model.pth', 'results0.pt', 'results1.pt']
    assert [l[:3] for l in ranks[0]['printed'].splitlines() if l.startswith('[')] == ['[0,', '[1,']


class AloneShare(ShareDL):
    def _broadcast(self, t, rank): return t

@pytest.mark.parametrize('workers', [0, 2])
def test_each_batch_draws_for_itself(workers):
    "Random crops of a ramp: their starts differ between batches and processes, not with the number of workers"
    from fastai_ecg_pma.data import ecg_dls
    from fastai_ecg_pma.records import Preprocess
    from fastai_ecg_pma.windows import RANDOM, EcgArray, InMemory
    ramp = np.tile(np.arange(5000, dtype=np.float32), (12, 1))
    X = EcgArray(InMemory([ramp]*48), starts=[RANDOM]*40 + [0]*8, prep=Preprocess(seq_len=100, standardize='none'))
    np.random.seed(0)
    dls = ecg_dls(X, None, None, np.arange(48) >= 40, bs=4, num_workers=workers)
    def starts(rank):
        np.random.seed(1)
        return [b[0][:,0,0].tolist() for b in AloneShare(dls.train, 'cpu', True, rank=rank, world_size=2)]
    a, b = starts(0), starts(1)
    assert len(a) == len(b) == 5 and len({tuple(v) for v in a + b}) == 10
    assert a == starts(0)
    if workers: assert a == BATCHES
    else: BATCHES[:] = a

BATCHES = []
