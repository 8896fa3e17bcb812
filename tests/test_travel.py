"""Weights that travel: to another process, by every read-out and encoder, and from strangers: pickles, tensors of any size, thousands of damaged files"""
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

warnings.filterwarnings('ignore', '.*torch.jit.script')
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import save_file
from torch import nn

from fastai_ecg_pma.aggregate import PPA, Concat, Fuse, GroupMeans, Last, LastMean, Layer, OwnNorm, SharedNorm, SignedStatic, Static, Together, class_head, linear_head
from fastai_ecg_pma.attend import AttentionPool, Attentive
from fastai_ecg_pma.cache import EcgCache, cache_ecg
from fastai_ecg_pma.checkpoint import Checkpoint, FellBack, load_best
from fastai_ecg_pma.closed_form import beats_learner, kernels_learner
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.synth import synth_ptbxl
from fastai_ecg_pma.trees import trees_learner
from fastai_ecg_pma.convnet import convnet_learner
from fastai_ecg_pma.compare import PMA_DEFAULT
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.features import DamagedCache, layer_features, remember
from fastai_ecg_pma.folder import read_config, read_folder, write_folder
from fastai_ecg_pma.gate import PMA, ClassPMA, LeadPMA, top_k
from fastai_ecg_pma.gates import prune
from fastai_ecg_pma.headers import BadRecord
from fastai_ecg_pma.layers import mean_leads, mean_max
from fastai_ecg_pma.learner import by_record, pma_learner, predict_record, pretrain_learner, row_scores
from fastai_ecg_pma.decide import calibrate, decide, predictor
from fastai_ecg_pma.saved import load_pma, model_facts, revive_model, save_pma
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.records import Preprocess, read_ecg
from fastai_ecg_pma.synth import PTBXL_LEADS, simulate_ecg, synth_ptbxl, write_record
from fastai_ecg_pma.stmem import load_original_pma, load_stmem_encoder, load_stmem_mae, save_stmem
from fastai_ecg_pma.tensorfile import DamagedFile, read_state, read_tensors, write_tensors
from fastai_ecg_pma.transfer import load_weights
from fastai_ecg_pma.vit1d import ViT1d
from fastai_ecg_pma.weights import load_encoder, save_encoder

PATCH, HYBRID = dict(ps=50, d=32, n_layers=3, n_heads=1), dict(d=32, n_layers=3, n_heads=1, stem=[8,16], strides=[2,2])


@pytest.fixture(scope='module')
def d(tmp_path_factory): return tmp_path_factory.mktemp('travel')

@pytest.fixture(scope='module')
def dls(d): return ptbxl_dls(synth_ptbxl(d/'ecgs', n=120), prep=Preprocess(fs=100, seq_len=500, stride=500), bs=16)

def fitted(dls, encoder=None, readout=partial(PMA, hidden=(16,8)), epochs=1, **kwargs):
    torch.manual_seed(0)
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
from fastai_ecg_pma.saved import load_pma
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


# ---- every read-out, head and encoder

X = torch.randn(24, 12, 500, generator=torch.Generator().manual_seed(0)).numpy()
PREP = Preprocess(fs=100, seq_len=500, stride=500)

def made_up(y, vocab=None): return ecg_dls(X, y, vocab, np.arange(24) >= 16, PREP, bs=8)

def of_task(task):
    n = np.arange(24)
    return dict(labels=lambda: made_up(np.stack([n % 2, n % 3 == 0, n % 5 == 0], 1).astype(np.float32), ['MI', 'NORM', 'CD']), **{'class': lambda: made_up(n % 3, ['a', 'b', 'c'])},
                numbers=lambda: made_up(np.stack([n, -n], 1).astype(np.float32)))[task]()

class Mine(Fuse):
    "Somebody's own read-out"
    def __init__(self, n_layers, d, sharp=2.):
        super().__init__(n_layers, d)
        self.sharp, self.u = sharp, nn.Parameter(torch.zeros(n_layers))
    def weights(self, h): return (self.sharp*self.u).softmax(-1).expand(len(h), -1)

class MyEncoder(nn.Module):
    "Somebody's own encoder, which does not keep its argument"
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(50, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 32, 0., batch_first=True) for _ in range(3))
    def forward(self, x):
        h = self.embed(x.mean(1).unflatten(-1, (-1, 50)))
        for b in self.blocks: h = b(h)
        return h

tsai = lambda name, **config: dict(arch=name, arch_config=config)
TST = dict(n_layers=3, d_model=16, n_heads=2, d_ff=32)
TSIT = dict(token_size=50, depth=3, d_model=16, n_heads=2)
PMA_SMALL = partial(PMA, hidden=(16,8))

READOUTS = {
    'last': dict(readout=Last), 'a layer': dict(readout=partial(Layer, l=1)), 'embeddings': dict(readout=partial(Layer, l=0)), 'PPA': dict(readout=PPA), 'mean of two': dict(readout=partial(LastMean, k=2)),
    'static': dict(readout=partial(Static, start='last')), 'signed': dict(readout=SignedStatic), 'PMA': dict(), 'PMA, default': PMA_DEFAULT, 'PMA, safe start': dict(readout=partial(PMA, hidden=(16,8), start='last')),
    'PMA, top 2': dict(readout=partial(PMA, choose=partial(top_k, k=2))), 'PMA, untrained gate': dict(readout=partial(PMA, train_gate=False)), 'PMA of all': dict(readout=partial(PMA, reads='all')),
    'leads': dict(readout=partial(LeadPMA, hidden=(16,8)), pool=mean_leads), 'classes': dict(readout=partial(ClassPMA, n_out=3, hidden=(16,8)), head=class_head),
    'attentive': dict(readout=partial(Attentive, n_heads=4, start='last')), 'attentive, leads': dict(readout=partial(Attentive, n_heads=2, n_leads=12), pool=mean_leads), 'concat': dict(readout=Concat),
    'groups': dict(readout=partial(GroupMeans, n_groups=2)), 'token pool': dict(token_pool=partial(AttentionPool, n_queries=2)), 'token pool by lead': dict(readout=LeadPMA, token_pool=partial(AttentionPool, by_lead=True)),
    'own norm': dict(layer_norm=OwnNorm), 'shared norm': dict(readout=Static, layer_norm=SharedNorm), 'linear head': dict(head=linear_head), 'two layers': dict(layers=[1,3]), 'last two': dict(layers=2), 'normed': dict(normed=True),
    'a head of ours': dict(head=lambda d, n: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 8, bias=False), nn.GELU(), nn.Linear(8, n))),
}
ENCODERS = {
    'TSTPlus': tsai('TSTPlus', **TST), 'TSTPlus, SDPA': dict(tsai('TSTPlus', **TST, res_attention=False), sdpa=True), 'TSiTPlus': tsai('TSiTPlus', **TSIT), 'TSiTPlus, SDPA': dict(tsai('TSiTPlus', **TSIT), sdpa=True),
    'TST': tsai('TST', **TST), 'gMLP': tsai('gMLP', patch_size=5, d_model=16, d_ffn=32, depth=3),
    'PatchTST': tsai('PatchTST', **TST), 'TSPerceiver': dict(tsai('TSPerceiver', n_latents=8, d_latent=16, n_layers=3, self_n_heads=2), readout=partial(PMA, reads='mean')),
    'EcgHybrid': tsai('EcgHybrid', **HYBRID), 'EcgHybrid, batch norm, mean and maximum': dict(tsai('EcgHybrid', **HYBRID, norm='batch'), pool=mean_max, head=partial(linear_head, drop=.3)),
    'EcgViT': tsai('EcgViT', **PATCH), 'ViT, stochastic depth': dict(arch=lambda dls: make_vit(dls, **PATCH, drop_path=.2, drop=.1)),
    'six leads asked of a ViT': dict(arch=lambda dls: _with_more_leads(dls)),
}
TASKS = {'one class': ('class', {}), 'numbers': ('numbers', {}), 'one class, last': ('class', dict(readout=Last))}
THEIRS = {'a read-out of theirs': (dict(readout=Mine), dict(known=[Mine])), 'a choice of theirs': (dict(readout=partial(PMA, choose=lambda s: s)), None),
          'an encoder of theirs': (dict(arch=lambda dls: MyEncoder(16)), dict(module=lambda: MyEncoder(16)))}

def _with_more_leads(dls):
    "A ViT that knows more leads than are read, in another order"
    enc = ViT1d(500, leads=[*PREP.leads[::-1], 'X'], **{k: v for k,v in PATCH.items() if k != 'ps'})
    enc.prep = PREP
    return enc

def shaken(learn):
    "No weight and no statistic as it was made, so that nothing can be right by chance"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k,v in learn.model.state_dict().items():
            if v.is_floating_point() and not k.endswith('pos') and not k.endswith('first'): v.add_(.1*torch.rand(v.shape, generator=g))
    return learn

def learner_of(task='labels', arch=None, **kwargs):
    dls = of_task(task)
    torch.manual_seed(0)
    arch = make_vit(dls, **PATCH) if arch is None else arch(dls) if not isinstance(arch, str) else arch
    return shaken(pma_learner(dls, arch, **{'readout': PMA_SMALL, **kwargs}, seed=0))

def same_answers(a, b, task, lead_records=3):
    "Outputs and weights of layers of two predictors, to the bit"
    x = torch.as_tensor(X[:6])
    with torch.no_grad(): assert torch.equal(a.model.eval()(x.clone()), b.model(x.clone()))
    assert (a.prep, a.labels, a.task, a.aggregate) == (b.prep, b.labels, b.task, b.aggregate) and a.task == task
    table = pd.DataFrame(X[0].T.astype(float), columns=list(PREP.leads))
    p, q = a.predict(table, fs=100), b.predict(table, fs=100)
    assert np.isfinite(p.probability).all() and p.probability.equals(q.probability)
    if p.gate is None: assert q.gate is None
    else: assert p.gate.equals(q.gate)
    assert (p.positive is None) == (q.positive is None) and (p.positive is None or p.positive.equals(q.positive))
    return p

def test_several_that_answer_together_travel(tmp_path):
    members = [learner_of(**kw).model for kw in (dict(), READOUTS['leads'])] + [kernels_learner(of_task('labels'), 60).model]
    p = replace(predictor(learner_of(), score=False), model=Together(members))
    save_pma(p, tmp_path/'m')
    answer = same_answers(p, load_pma(tmp_path/'m'), 'labels')
    card = (tmp_path/'m'/'README.md').read_text()
    assert answer.gate is None and '3 that answer together' in card and card.count('1 × ViT1d') == 2 and '1 × RandomKernels (60 kernels)' in card
    x = torch.as_tensor(X[:4])
    with torch.no_grad(): assert torch.allclose(load_pma(tmp_path/'m').model(x), sum(m.eval()(x) for m in members)/3, atol=1e-6)

@pytest.mark.parametrize('make', [kernels_learner, beats_learner])
def test_random_kernels_travel(make, tmp_path):
    p = predictor(make(of_task('labels'), 60), score=False)
    save_pma(p, tmp_path/'m')
    same_answers(p, load_pma(tmp_path/'m'), 'labels')
    facts, state = model_facts(p.model), p.model.state_dict()
    facts['backbone']['args']['n'] = 10**9                                   # neither drawn nor allocated
    with pytest.raises(ValueError): revive_model(facts, state, PREP)
    with pytest.raises(ValueError, match='neither of the encoder'): revive_model(model_facts(p.model), {**state, 'more': torch.ones(1)}, PREP)

def test_trees_travel(tmp_path):
    dls = ptbxl_dls(synth_ptbxl(tmp_path/'ecgs', n=60), bs=16)
    p = predictor(trees_learner(dls, n_trees=20), score=False)
    trees, records = p.model.head.classifier, [f.as_posix() for f in dls.paths[-10:]]
    want = p.predict(records).probability.to_numpy()
    assert np.ptp(want, 0).min() > .01
    for half,far in ((False, 0), (True, 1e-3)):                              # thresholds bear 16 bits without loss
        save_pma(p, tmp_path/'m', half=half)
        again = load_pma(tmp_path/'m')
        np.testing.assert_allclose(again.predict(records).probability.to_numpy(), want, rtol=0, atol=far)
        assert torch.equal(again.model.head.classifier.threshold, trees.threshold) and torch.equal(again.model.head.classifier.leaf, trees.leaf) != half
    assert 'read by Trees' in (tmp_path/'m'/'README.md').read_text()
    for k,v in (('n_trees', 10**9), ('depth', 40), ('depth', 2.5)):
        facts = model_facts(p.model)
        facts['head']['args']['classifier']['args'][k] = v
        with pytest.raises(ValueError): revive_model(facts, p.model.state_dict(), p.prep)

@pytest.mark.parametrize('task', ['labels', 'class', 'numbers'])
def test_convolutional_networks_travel(task, tmp_path):
    p = predictor(convnet_learner(of_task(task), seed=0), score=False)
    save_pma(p, tmp_path/'m')
    same_answers(p, load_pma(tmp_path/'m'), task)
    assert 'xresnet1d18 (' in (tmp_path/'m'/'README.md').read_text()
    facts = model_facts(p.model)
    for name in ('xresnet1d50', 'os.system', 3):
        with pytest.raises(ValueError): revive_model({**facts, 'backbone': {**facts['backbone'], 'args': {**facts['backbone']['args'], 'arch': name}}}, p.model.state_dict(), PREP)

@pytest.mark.parametrize('n,says', [(0, 'list of 1 to'), (1, 'of no member'), (101, 'list of 1 to')])
def test_members_that_a_file_counts_wrongly(n, says):
    model = Together([learner_of().model, learner_of().model])
    facts = model_facts(model)
    with pytest.raises(ValueError, match=says): revive_model(dict(members=(facts['members']*51)[:n]), model.state_dict(), PREP)

def test_members_of_an_encoder_that_has_no_name(tmp_path):
    learn = learner_of(**THEIRS['an encoder of theirs'][0])
    with pytest.raises(ValueError): save_pma(replace(predictor(learn, score=False), model=Together([learn.model]*2)), tmp_path/'m')
    assert not (tmp_path/'m').exists()

@pytest.mark.parametrize('name', [*READOUTS, *ENCODERS, *TASKS])
def test_every_kind_travels(name, tmp_path):
    task, kwargs = TASKS[name] if name in TASKS else ('labels', {**READOUTS, **ENCODERS}[name])
    learn = learner_of(task, **kwargs)
    if task == 'class': calibrate(learn, 'temperature', ds_idx=0)
    p = predictor(learn, score=False)
    save_pma(p, tmp_path/'m')
    del learn
    back = load_pma(tmp_path/'m')
    answer = same_answers(p, back, task)
    if task == 'class': assert abs(answer.probability.sum() - 1) < 1e-9 and answer.positive.sum() == 1 and back.calibration.one_class
    if 'SDPA' in name: assert any(type(m).__name__.startswith('Sdpa') for m in back.model.modules())
    if name == 'leads': assert list(answer.gate.columns) == list(PREP.leads) and len(answer.gate) == 3
    if name == 'classes': assert list(answer.gate.columns) == ['MI', 'NORM', 'CD']
    if name == 'two layers': assert back.model.backbone.chosen == [1, 3]

@pytest.mark.parametrize('name', ['leads', 'classes'])
def test_weights_of_leads_and_classes_by_name(name, tmp_path):
    save_pma(learner_of(**READOUTS[name]), tmp_path/'m', score=False)
    back, path = load_pma(tmp_path/'m'), written(tmp_path/'r'/'r')
    with torch.no_grad(): w = back.model.weights(torch.as_tensor(back.prep.windows(path))).double().mean(0).numpy()       # [n_layers,n_leads or n_out]
    one, many = back.predict(path).gate, back.predict([path, path]).gate
    columns = list(PREP.leads) if name == 'leads' else ['MI', 'NORM', 'CD']
    assert np.ptp(w, 1).max() > 1e-4 and np.ptp(w, 0).max() > 1e-3
    for l in (1, 2, 3):
        for i,c in enumerate(columns): assert abs(one.loc[l,c] - w[l-1,i]) < 1e-6 and (abs(many[f'{l} {c}'] - w[l-1,i]) < 1e-6).all()

def test_a_threshold_that_is_reached(folder, valid_paths):
    pma = load_pma(folder)
    p = pma.predict(valid_paths[0]).probability
    for at,want in ((p, True), (np.nextafter(p, 2), False)):
        got = replace(pma, thresholds=replace(pma.thresholds, at=tuple(map(float, at)))).predict(valid_paths[0])
        assert (got.positive == want).all()

@pytest.mark.parametrize('name', THEIRS)
def test_what_is_somebodys_own(name, tmp_path):
    kwargs, ways = THEIRS[name]
    learn = learner_of(**kwargs)
    p = predictor(learn, score=False)
    if ways is None:
        with pytest.raises(ValueError, match='has no name of its own'): save_pma(p, tmp_path/'m')
        assert not (tmp_path/'m').exists()
        return
    save_pma(p, tmp_path/'m', known=ways.get('known', ()))
    with pytest.raises(ValueError, match='`known`|has to be given as a module'): load_pma(tmp_path/'m')
    same_answers(p, load_pma(tmp_path/'m', **{k: v() if callable(v) else v for k,v in ways.items()}), 'labels')

def test_a_pruned_model_travels_and_is_smaller(tmp_path):
    learn = learner_of(readout=partial(Layer, l=2))
    save_pma(learn, tmp_path/'whole', score=False)
    want = learn.model.eval()(torch.as_tensor(X[:4]))
    learn.model = prune(learn)
    save_pma(learn, tmp_path/'pruned', score=False)
    a, b = ((tmp_path/n/'model.safetensors').stat().st_size for n in ('whole', 'pruned'))
    assert b < .8*a
    back = load_pma(tmp_path/'pruned')
    same_answers(predictor(learn, score=False), back, 'labels')
    torch.testing.assert_close(back.model(torch.as_tensor(X[:4])), want, rtol=0, atol=1e-5)
    assert back.model.backbone.n_layers == 2

def test_a_predictor_saved_again_is_the_same_file(tmp_path, folder):
    back = load_pma(folder)
    save_pma(back, tmp_path/'again')
    for f in ('model.safetensors', 'README.md'): assert (folder/f).read_bytes() == (tmp_path/'again'/f).read_bytes()
    a, b = (json.loads((p/'config.json').read_text()) for p in (folder, tmp_path/'again'))
    assert {k: v for k,v in a.items() if k not in ('facts', 'sha256')} == {k: v for k,v in b.items() if k not in ('facts', 'sha256')}


# ---- pickles from strangers

class Trap:
    "Unpickled, it makes a file"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (Path.touch, (self.mark,))

def trapped(mark):
    "Files that run something where they are unpickled: name, bytes, what would unpickle them"
    trap, out = Trap(mark), {}
    def torch_bytes(o, **kwargs): torch.save(o, b := io.BytesIO(), **kwargs); return b.getvalue()
    state = {'w': torch.ones(2)}
    plain = lambda b: pickle.loads(b)
    loose = lambda b: torch.load(io.BytesIO(b), weights_only=False)
    for name,o in dict(bare=trap, beside={'model': state, 'opt': trap}, within={**state, 'x': trap}).items():
        out[f'zip, {name}'] = torch_bytes(o), loose
        out[f'legacy, {name}'] = torch_bytes(o, _use_new_zipfile_serialization=False), loose
        out[f'pickle, {name}'] = pickle.dumps(o), plain
    out['pickle, protocol 0'] = pickle.dumps(trap, 0), plain
    return out

@pytest.fixture(scope='module')
def traps(d):
    "`{name: bytes}`, each seen to work once"
    (d/'mark').unlink(missing_ok=True)
    made = trapped(d/'mark')
    for name,(raw,load) in made.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            load(raw)
        assert (d/'mark').exists(), name
        (d/'mark').unlink()
    return {name: raw for name,(raw,_) in made.items()}

@pytest.fixture
def untouched(d):
    yield
    assert not (d/'mark').exists(), 'something was unpickled'

SUFFIXES = '.pth', '.pt', '.pkl', '.bin', '.safetensors', ''

@pytest.mark.parametrize('suffix', SUFFIXES)
def test_no_file_of_weights_is_unpickled(suffix, traps, dls, tmp_path, untouched):
    file, model = tmp_path/f'weights{suffix}', make_vit(dls, **PATCH)
    routes = dict(read_state=lambda: read_state(file), read_tensors=lambda: read_tensors(file), load_weights=lambda: load_weights(model, file), load_encoder=lambda: load_encoder(file), load_stmem_encoder=lambda: load_stmem_encoder(file),
                  load_stmem_mae=lambda: load_stmem_mae(file), load_original_pma=lambda: load_original_pma(file), pma_learner=lambda: pma_learner(dls, file), text=lambda: pma_learner(dls, str(file)),
                  weights_path=lambda: pma_learner(dls, 'TSTPlus', arch_config=TST, weights_path=file), pretrain=lambda: pretrain_learner(dls, file), layer_features=lambda: layer_features(file, dls))
    for name,raw in traps.items():
        file.write_bytes(raw)
        for route,load in routes.items():
            if route in SLOW and name not in ('zip, within', 'pickle, bare'): continue
            with pytest.raises(ValueError) as e: load()
            assert file.name in str(e.value), (route, name, e.value)

SLOW = 'text', 'weights_path', 'pma_learner', 'pretrain', 'layer_features'

def test_no_folder_of_a_model_is_unpickled(traps, dls, folder, tmp_path, untouched):
    enc = make_vit(dls, **PATCH)
    save_encoder(enc, tmp_path/'enc')
    shutil.copytree(folder, tmp_path/'pma')
    for kind,load in (('enc', load_encoder), ('pma', load_pma), ('pma', load_encoder), ('enc', lambda f: pma_learner(dls, f)), ('pma', lambda f: pretrain_learner(dls, f))):
        for part in ('model.safetensors', 'config.json'):
            good = (tmp_path/kind/part).read_bytes()
            for raw in traps.values():
                (tmp_path/kind/part).write_bytes(raw)
                with pytest.raises(DamagedFile) as e: load(tmp_path/kind)
                assert part in str(e.value)
            (tmp_path/kind/part).write_bytes(good)
        for raw in traps.values():                                               # an attacker would write its hash down, too
            (tmp_path/kind/'model.safetensors').write_bytes(raw)
            rewrite(tmp_path/kind, weights=sha256(raw).hexdigest())
            with pytest.raises(ValueError, match='model.safetensors is damaged, or no file of plain weights'): load(tmp_path/kind)
        (tmp_path/kind/'model.safetensors').unlink(); (tmp_path/kind/'config.json').unlink()
        shutil.copytree(folder, tmp_path/'pma', dirs_exist_ok=True); save_encoder(enc, tmp_path/'enc')
    load_pma(tmp_path/'pma'); load_encoder(tmp_path/'enc')

def rewrite(folder, **changes):
    "Change a model's configuration as a stranger would, its hash made anew"
    c = {**json.loads((folder/'config.json').read_text()), **changes}
    (folder/'config.json').write_text(json.dumps({**c, 'sha256': hash_of(c)}))

def hash_of(config):
    "As the format says: SHA-256 of the sorted JSON of all but itself"
    return sha256(json.dumps({k: v for k,v in config.items() if k != 'sha256'}, sort_keys=True).encode()).hexdigest()

def test_no_checkpoint_is_unpickled(traps, dls, tmp_path, untouched):
    def run():
        learn = pma_learner(dls, make_vit(dls, **PATCH), PMA_SMALL, seed=0, cbs=Checkpoint(tmp_path/'run'))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    learn = run()
    files = sorted((tmp_path/'run').glob('*.safetensors'))
    assert [f.name.split('-')[0] for f in files] == ['best.safetensors', 'fit0', 'fit0']
    for raw in traps.values():
        for f in files: f.write_bytes(raw)
        with pytest.raises(DamagedFile, match='best.safetensors is damaged'): load_best(learn, tmp_path/'run')
    with pytest.warns(FellBack, match='begins anew'): run()                        # all are put aside, one after the other

def test_no_kept_result_is_unpickled(traps, tmp_path, untouched):
    about, make = dict(what='a result'), lambda: {'h': torch.arange(3.)}
    remember(tmp_path, about, make)
    file, = tmp_path.iterdir()
    for raw in traps.values():
        file.write_bytes(raw)
        with pytest.warns(DamagedCache, match='made anew'): got = remember(tmp_path, about, make)
        assert torch.equal(got['h'], torch.arange(3.)) and torch.equal(read_tensors(file)[0]['h'], torch.arange(3.))

def test_no_cache_of_records_is_unpickled(traps, dls, d, tmp_path, untouched):
    names = [str(Path(p).relative_to(d/'ecgs')) for p in dls.paths[:3]]
    cache_ecg(d/'ecgs', names, tmp_path/'cache', progress=False)
    for part in ('manifest.json', 'index.jsonl', 'table.json'):
        good = (tmp_path/'cache'/part).read_bytes()
        for raw in traps.values():
            (tmp_path/'cache'/part).write_bytes(raw)
            for load in (lambda: EcgCache(tmp_path/'cache'), lambda: cache_ecg(d/'ecgs', names, tmp_path/'cache', progress=False)):
                with pytest.raises(ValueError, match=part): load()
        (tmp_path/'cache'/part).write_bytes(good)
    (tmp_path/'cache'/'signal.bin').write_bytes(max(traps.values(), key=len))
    with pytest.raises(ValueError, match='signal.bin'): EcgCache(tmp_path/'cache')


# ---- small files that ask for much

def changed(config, path, value):
    "A copy of `config` with another value at `path`, such as 'model.encoder.model.args.d'; a function is called with what was there"
    c = at = json.loads(json.dumps(config))
    *way, last = path.split('.')
    for k in way: at = at[int(k) if isinstance(at, list) else k]
    last = int(last) if isinstance(at, list) else last
    at[last] = value(at[last]) if callable(value) else value
    return c

LINEAR = {'class': 'torch.nn.Linear', 'args': {'in_features': 2**16, 'out_features': 2**16}}            # 17 GB
BUFFERS = {'class': 'torch.nn.BatchNorm1d', 'args': {'num_features': 2**31, 'affine': False}}           # as much, and no parameters
ENC, HEAD = 'model.encoder.model.args.', 'model.head.args.'
GREEDY = {                              # of config.json: name: path, value; an attacker makes the hash anew
    'wide': (ENC+'d', 2**40), 'deep': (ENC+'n_layers', 10**6), 'deeper': (ENC+'n_layers', 2**62), 'heads': (ENC+'n_heads', 2**40), 'long': (ENC+'seq_len', 2**40), 'long patches': (ENC+'ps', 2**40),
    'many leads': (ENC+'leads', lambda v: [f'L{i}' for i in range(100_000)]), 'wide gate': (HEAD+'fuse.args.hidden', {'tuple': [2**40, 8]}), 'wide fuse': (HEAD+'fuse.args.d', 2**40), 'many layers': (HEAD+'fuse.args.n_layers', 2**40),
    'another fuse': (HEAD+'fuse', {'class': 'fastai_ecg_pma.gate.ClassPMA', 'args': {'n_layers': 3, 'd': 32, 'n_out': 2**40}}), 'classifier': (HEAD+'classifier', LINEAR), 'norm': (HEAD+'layer_norm', LINEAR), 'no parameters': (HEAD+'layer_norm', BUFFERS),
    'pool': ('model.pool', LINEAR), 'pool of buffers': ('model.pool', BUFFERS), 'pool in a list': ('model.pool', [LINEAR]), 'pool in a partial': ('model.pool', {'partial': 'fastai_ecg_pma.layers.mean_tokens', 'args': [], 'kwargs': {'special': LINEAR}}),
    'many modules': (HEAD+'layer_norm', {'class': 'torch.nn.Sequential', 'parts': {str(i): {'class': 'torch.nn.Linear', 'args': {'in_features': 32, 'out_features': 32}} for i in range(5000)}}),
    'nested': (HEAD+'layer_norm', lambda v: nested(200)), 'window': ('preprocess.seq_len', 2**40), 'order': ('preprocess.order', 2**40), 'leads': ('preprocess.leads', [f'L{i}' for i in range(100_000)]), 'rate': ('preprocess.fs', 1e-300),
    'points': ('calibration', lambda c: dict(method='isotonic', names=c['names'], x=[[i/10**6 for i in range(10**6//4)]]*4, y=[[i/10**6 for i in range(10**6//4)]]*4, one_class=False)), 'labels': ('labels', [f'L{i}' for i in range(200_000)]),
    'blocks': ('model.blocks', [['blocks.0']*20_000]), 'layers': ('model.layers', list(range(1, 200_000))),
}

def nested(n):
    out = {'class': 'torch.nn.Identity', 'args': {}}
    for _ in range(n): out = {'class': 'torch.nn.Sequential', 'parts': {'0': out}}
    return out

def greedy_files(at):
    "Files of weights that are small, and claim much: `{name: path}`"
    state, out = {'w': torch.zeros(1000)}, {}
    def put(name, raw): (at/name).write_bytes(raw); out[name] = at/name
    def saved(o, **kwargs): torch.save(o, b := io.BytesIO(), **kwargs); return b.getvalue()
    def header(h, tail=b'0'*100, n=None): h = h if isinstance(h, bytes) else json.dumps(h).encode(); return (len(h) if n is None else n).to_bytes(8, 'little') + h + tail
    put('claims.safetensors', header({'w': dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42])}))
    put('overlap.safetensors', header({f'w{i}': dict(dtype='F32', shape=[25], data_offsets=[0, 100]) for i in range(5000)}))
    put('header.safetensors', header(b'{}', n=2**62)); put('header2.safetensors', header(b'{}', n=90_000_000))
    put('deep.safetensors', header(b'['*100_000)); put('deep2.safetensors', header(b'{"w":'*100_000))
    put('empties.safetensors', header({f'w{i}': dict(dtype='F32', shape=[0, 2**40], data_offsets=[0, 0]) for i in range(3000)}, b''))
    with zipfile.ZipFile(io.BytesIO(saved(state))) as a, zipfile.ZipFile(at/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as b:
        for n in a.namelist(): b.writestr(n, bytes(2**27) if n.endswith('data/0') else a.read(n))
    out['bomb.pth'] = at/'bomb.pth'
    raw = bytearray(saved(state)); i = raw.rfind(b'PK\x01\x02'); raw[i+20:i+28] = (2**31).to_bytes(4, 'little')*2; put('sizes.pth', bytes(raw))
    put('view.pth', saved({'w': torch.zeros(1).expand(2**30)})); put('views.pth', saved({f'w{i}': state['w'] for i in range(5000)}))
    put('meta.pth', saved({'w': torch.zeros(2**40, device='meta')})); put('legacy.pth', saved(state, _use_new_zipfile_serialization=False))
    put('sparse.pth', saved({'w': torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=int), torch.ones(1), (2**32,))}))
    return out

GREED = '''
import json, resource, sys, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
from fastai_ecg_pma.saved import load_pma
from fastai_ecg_pma.stmem import load_original_pma, load_stmem_encoder, load_stmem_mae
from fastai_ecg_pma.tensorfile import read_state
from fastai_ecg_pma.weights import load_encoder
good, rows = load_pma(sys.argv[1]), []                     # all that a first use takes is there
size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300*2**20,)*2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
before = peak()
for name,path,route in json.load(open(sys.argv[2])):
    t0, p0 = time.perf_counter(), peak()
    try: globals()[route](path); said = None
    except BaseException as e: said = ['ValueError' if isinstance(e, ValueError) else type(e).__name__, str(e)]
    rows.append([name, route, said, time.perf_counter()-t0, peak()-p0])
print(json.dumps(dict(rows=rows, growth=peak()-before)))
'''

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='Linux tells how much memory is taken')
def test_nothing_small_takes_much(d, folder, root, tmp_path):
    cases, config = [], json.loads((folder/'config.json').read_text())
    for name,(path,value) in GREEDY.items():
        shutil.copytree(folder, tmp_path/name)
        rewrite(tmp_path/name, **changed(config, path, value))
        cases += [(name, str(tmp_path/name), r) for r in ('load_pma', 'load_encoder')]
    for n in (100, 300, 500, 900, 1500, 100_000):
        shutil.copytree(folder, f := tmp_path/f'brackets{n}')
        c = json.dumps(dict(config, facts='HERE'))
        (f/'config.json').write_text(c.replace('"HERE"', '{"a":'*n + '1' + '}'*n))
        cases.append((f.name, str(f), 'load_pma'))
    for name,path in greedy_files(tmp_path).items(): cases += [(name, str(path), r) for r in ('read_state', 'load_encoder', 'load_stmem_mae', 'load_original_pma')]
    (tmp_path/'cases.json').write_text(json.dumps(cases))
    r = subprocess.run([sys.executable, '-c', GREED, str(folder), str(tmp_path/'cases.json')], env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(root)), capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-3000:]
    got = json.loads(r.stdout.splitlines()[-1])
    fine = [(n, r) for n,r,said,*_ in got['rows'] if said is None]
    odd = [row for row in got['rows'] if row[2] and (row[2][0] != 'ValueError' or 'alloc' in row[2][1] or 'memory' in row[2][1] or len(row[2][1]) < 10)]
    slow = [row for row in got['rows'] if row[3] > 2 or row[4] > 100]
    if os.environ.get('SHOW'):
        for row in got['rows']: print(*row[:2], row[2] and (row[2][0], row[2][1][-110:]), *map('{:.2f}'.format, row[3:]))
    assert not odd and not slow, (odd, slow)
    assert set(fine) == UNHARMED, set(fine) ^ UNHARMED
    assert got['growth'] < 200

# what is well as it is: an encoder whose file is asked for nothing beside it, the identity two hundred times, a rate at which no record can be read, tensors without a number
UNHARMED = {(n, 'load_encoder') for n,(path,_) in GREEDY.items() if not path.startswith(ENC) and n != 'points'} | {(n, 'load_pma') for n in ('nested', 'rate')} | {('empties.safetensors', 'read_state')}


# ---- thousands of damaged files

def damaged(rng, raw, other):
    "`raw` with one kind of damage, at times with several; `other` is a file of the same kind, from which pieces come"
    b = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        i, n = rng.randrange(len(b)+1), rng.choice([1, 1, 2, 8, 64, 1000])
        kind = rng.choice(['cut', 'head', 'flip', 'flip', 'byte', 'insert', 'delete', 'zero', 'twice', 'other', 'digit'])
        if kind == 'cut': del b[i:]
        elif kind == 'head': b[:min(i, 300)] = other[:min(i, 300)]
        elif kind == 'flip' and i < len(b): b[i] ^= 1 << rng.randrange(8)
        elif kind == 'byte' and i < len(b): b[i] = rng.randrange(256)
        elif kind == 'insert': b[i:i] = rng.randbytes(n)
        elif kind == 'delete': del b[i:i+n]
        elif kind == 'zero': b[i:i+n] = bytes(len(b[i:i+n]))
        elif kind == 'twice': b[i:i] = b[i:i+n]
        elif kind == 'other': b[i:i+n] = other[i:i+n]
        elif kind == 'digit' and (at := [j for j in range(max(0, i-200), min(len(b), i)) if 48 <= b[j] < 58]): b[rng.choice(at)] = 48 + rng.randrange(10)
        if not b: break
    return bytes(b)

def outcome(load, names, allowed=(ValueError, FileNotFoundError)):
    "What `load` gives, or None where it refused with a message that names one of `names`; any other exception is raised"
    try: return load()
    except allowed as e:
        assert any(n in str(e) for n in names), f'{type(e).__name__} does not say which file: {e}'
        return None

def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(scope='module')
def two(d, folder):
    "Bytes of two small models, `[{name: bytes}]`, and what the first one holds"
    save_pma(learner_of(), d/'second', score=False)
    return [{f: (p/f).read_bytes() for f in ('config.json', 'model.safetensors')} for p in (folder, d/'second')], read_folder(folder, 'pma')

@pytest.mark.parametrize('part', ['config.json', 'model.safetensors'])
def test_damaged_bytes_of_a_folder(part, two, tmp_path):
    ((good, other), (config, state)), rng, seen = two, random.Random(part), Counter()
    for f,b in good.items(): (tmp_path/f).write_bytes(b)
    for i in range(2000):
        (tmp_path/part).write_bytes(raw := damaged(rng, good[part], other[part]))
        got = outcome(lambda: (load_pma if i % 100 == 0 else lambda f: read_folder(f, 'pma'))(tmp_path), [str(tmp_path)])
        seen[got is None] += 1
        if isinstance(got, tuple): assert got[0] == config and same_state(got[1], state) and (part == 'config.json' or raw == good[part])     # only white space and the last digits of a number
    assert seen[True] > 1900

def test_files_that_are_mixed_up(two, tmp_path):
    (good, other), _ = two
    def put(a, b, names=('config.json', 'model.safetensors')):
        shutil.rmtree(tmp_path); tmp_path.mkdir()
        for n,raw in zip(names, (a, b)):
            if raw is not None: (tmp_path/n).write_bytes(raw)
    for a,b,names,exc in ((good['config.json'], other['model.safetensors'], None, DamagedFile), (other['config.json'], good['model.safetensors'], None, DamagedFile), (good['model.safetensors'], good['config.json'], None, DamagedFile),
                          (good['config.json'], None, None, FileNotFoundError), (None, good['model.safetensors'], None, FileNotFoundError), (None, None, None, FileNotFoundError),
                          (*good.values(), ('config.jsn', 'model.safetensors'), FileNotFoundError), (*good.values(), ('config.json', 'weights.safetensors'), FileNotFoundError), (b'', b'', None, DamagedFile), (good['config.json'], b'', None, DamagedFile)):
        put(a, b, *([names] if names else []))
        for load in (load_pma, load_encoder):
            with pytest.raises(exc) as e: load(tmp_path)
            assert type(e.value) is exc and str(tmp_path) in str(e.value)
    for number in (b'NaN', b'Infinity', b'-Infinity', b'1e999', b'-1e999', b'9'*5000):
        put(good['config.json'].replace(b'"fs": 100', b'"fs": '+number), good['model.safetensors'])
        with pytest.raises(DamagedFile, match='config.json is damaged'): load_pma(tmp_path)
    (tmp_path/'config.json').unlink(missing_ok=True); (tmp_path/'config.json').mkdir()
    with pytest.raises(FileNotFoundError): load_pma(tmp_path)
    for load in (load_pma, load_encoder):
        with pytest.raises(FileNotFoundError, match='nowhere'): load(tmp_path/'nowhere')

@pytest.mark.parametrize('name', ['nowhere.w', 'backbone.pool.w', 'head.more', 'backbone.encoder.more'])
def test_weights_that_belong_nowhere(name, folder, tmp_path):
    shutil.copytree(folder, f := tmp_path/'m')
    write_tensors(f/'model.safetensors', read_state(f/'model.safetensors') | {name: torch.zeros(1)}, format='pt')
    rewrite(f, weights=sha256((f/'model.safetensors').read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=name.split('.')[-1]): load_pma(f)

VALUES = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -2**40, 10**400, .5, -1e-300, 1e300, '', 'x', 'V1', 'mean', '\ud800', 'a'*300, [], [0], [[]], ['I', 'II'], [1, 'a'], {}, {'class': 'torch.nn.Identity', 'args': {}}, {'function': 'fastai_ecg_pma.layers.mean_leads'},
          {'tuple': [1, 2]}, {'dict': {}}, {'partial': 'fastai_ecg_pma.gate.top_k', 'args': [], 'kwargs': {'k': 2}}, {'class': 'torch.nn.Linear', 'args': {}}, {'class': 'fastai_ecg_pma.layers.LayerStack', 'args': {'encoder': {'class': 'torch.nn.Identity', 'args': {}}}}]

def places(o, at=()):
    "The ways to every value in `o`"
    yield at
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*at, k))

def mutated(rng, config):
    "A configuration with one or two values that are others"
    c = json.loads(json.dumps(config))
    for _ in range(rng.choice([1, 1, 2])):
        *way, last = rng.choice([p for p in places(c) if p and p[0] not in ('facts', 'versions', 'sha256', 'weights')] )
        at = c
        for k in way: at = at[k]
        kind = rng.choice(['value', 'value', 'value', 'gone', 'new', 'swap', 'list', 'number'])
        if kind == 'value': at[last] = rng.choice(VALUES)
        elif kind == 'gone': del at[last]
        elif kind == 'new' and isinstance(at, dict): at[rng.choice(['x', 'device', 'class', 'dict', 'verbose', ''])] = rng.choice(VALUES)
        elif kind == 'swap' and isinstance(at, list): rng.shuffle(at)
        elif kind == 'list': at[last] = [at[last]]
        elif kind == 'number' and isinstance(at[last], (int, float)): at[last] = rng.choice([-1, 2, .5, 1e9, 10])*at[last]
    return c

def test_strange_values_in_a_configuration(folder, d, tmp_path):
    x = pd.DataFrame(simulate_ecg(rng=3, seconds=10).T, columns=list(PTBXL_LEADS))
    rng, seen = random.Random(0), Counter()
    save_pma(learner_of(**ENCODERS['TSTPlus']), d/'tst', score=False)
    for base,n in ((folder, 110), (d/'tst', 20)):
        shutil.copytree(base, f := tmp_path/base.name)
        config = json.loads((f/'config.json').read_text())
        for i in range(n):
            c = mutated(rng, config)
            (f/'config.json').write_text(json.dumps({**c, 'sha256': hash_of(c)}))
            if i % 3 == 0: outcome(lambda: load_encoder(f), [str(f)])
            pma = outcome(lambda: load_pma(f), [str(f)])
            seen[pma is None] += 1
            if pma is None: continue
            try: p = pma.predict(x, fs=100)
            except BadRecord: seen['bad record'] += 1; continue
            assert np.isfinite(p.probability).all() and len(p.probability) == len(pma.labels), c
    assert seen[True] > 60 and seen[False] > 10, seen

def test_damaged_bytes_of_files_of_others(tmp_path):
    "Of a file under ST-MEM's names and of a safetensors file: refused, or weights that are numbers"
    torch.manual_seed(0)
    a, b = (ViT1d(100, 50, d=16, n_layers=2, n_heads=1, leads=['I', 'II']) for _ in range(2))
    for n,m in zip('ab', (a, b)): save_stmem(m, tmp_path/f'{n}.pth'); write_tensors(tmp_path/f'{n}.safetensors', m.state_dict()); save_file(m.state_dict(), tmp_path/f'{n}2.safetensors')
    rng, seen, own = random.Random(1), Counter(), a.state_dict()
    for kind,n,load in (('.pth', 700, lambda f: load_encoder(f, ['I', 'II']).state_dict()), ('.safetensors', 300, lambda f: read_tensors(f)[0]), ('2.safetensors', 500, read_state)):
        good, other = ((tmp_path/f'{m}{kind}').read_bytes() for m in 'ab')
        (file := tmp_path/f'x{kind}').write_bytes(good)
        assert same_state(load(file), own)
        for _ in range(n):
            file.write_bytes(raw := damaged(rng, good, other))
            got = outcome(lambda: load(file), [file.name])
            seen[kind, got is None] += 1
            if got is None: continue
            if kind == '.safetensors': assert raw == good
            if kind == '.pth': assert got.keys() == own.keys() and all(v.shape == own[k].shape and v.isfinite().all() for k,v in got.items())
            assert sum(v.numel()*v.element_size() for v in got.values()) <= 4*len(raw)
    assert all(seen[k, True] > 100 for k in ('.pth', '.safetensors', '2.safetensors')) and seen['.pth', False] > 50, seen


# ---- the format

def test_the_first_format_and_those_to_come(folder, tmp_path):
    enc = ViT1d(100, 50, d=16, n_layers=2, n_heads=1, leads=['I', 'II']).eval()
    save_file(enc.state_dict(), tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(format=1, model='ViT1d', encoder=enc.config, preprocess=None)))
    back, x = load_encoder(tmp_path), torch.randn(2, 2, 100)
    assert torch.equal(back(x), enc(x)) and back.leads == ['I', 'II'] and back.prep is None
    with pytest.raises(ValueError, match="holds 'encoder', not 'pma'"): load_pma(tmp_path)
    shutil.copytree(folder, f := tmp_path/'pma')
    config = json.loads((f/'config.json').read_text())
    for changes,said in ((dict(format=3), r'has format 3, this version of fastai_ecg_pma reads up to 2: update it'), (dict(format=10**30), 'update it'), (dict(format=0), 'never was'), (dict(format=-1), 'never was'), (dict(format='2'), 'names no format'),
                         (dict(format=True), 'names no format'), (dict(format=2.), 'names no format'), (dict(format=1), 'format 1 describes a ViT1d'), (dict(kind='gate'), "holds 'gate', not"), (dict(kind=None), 'holds None'), (dict(kind=['pma']), 'holds'), (dict(kind='encoder'), '')):
        rewrite(f, **{**config, **changes})
        with pytest.raises(ValueError, match=said): load_pma(f)
    rewrite(f, **config)
    load_pma(f)

def test_the_card_may_be_edited(folder, tmp_path, valid_paths):
    shutil.copytree(folder, f := tmp_path/'m')
    want = load_pma(folder).predict(valid_paths[0]).probability
    for change in (lambda p: p.write_text('# nothing'), lambda p: p.write_bytes(b'\x80\x04K\x01.'), lambda p: p.unlink()):
        change(f/'README.md')
        assert load_pma(f).predict(valid_paths[0]).probability.equals(want)
    (f/'README.md').mkdir()                                                        # and it is not read
    assert load_pma(f).predict(valid_paths[0]).probability.equals(want)

def test_the_hub_understands_the_card(folder, learn, tmp_path):
    hub = pytest.importorskip('huggingface_hub')
    card = hub.ModelCard.load(folder/'README.md')
    assert card.data.library_name == 'fastai_ecg_pma' and card.data.license == 'apache-2.0' and 'ecg' in card.data.tags
    assert '# made up' in card.text and str(learn.dls.vocab[0]) in card.text
    save_pma(load_pma(folder), tmp_path/'m', title='---\nlicense: mit\n---', notes='a: b', license='x: [y')
    card = hub.ModelCard.load(tmp_path/'m'/'README.md')
    assert card.data.license == 'x: [y' and card.data.library_name == 'fastai_ecg_pma'


# ---- records that are not as those it was trained on

@pytest.fixture(scope='module')
def pma(folder): return load_pma(folder)

ECG = simulate_ecg(('IMI',), rng=5, seconds=10)

def written(path, x=ECG, fs=100, leads=PTBXL_LEADS, units='mV', gain=1000.):
    "A record of `x` in mV; its numbers are kept at 1 µV"
    import wfdb
    path.parent.mkdir(exist_ok=True)
    wfdb.wrsamp(path.name, fs=fs, units=[units]*len(x), sig_name=list(leads), fmt=['16']*len(x), adc_gain=[gain]*len(x), baseline=[0]*len(x), write_dir=str(path.parent),
                d_signal=np.where(np.isnan(x), -2**15, np.round(np.nan_to_num(x)*1000)).T.astype(np.int16))
    return path

def by_hand(pma, path, prep=None):
    "What the stored preprocessing gives, step by step: read by name, windows by hand, model, sigmoid, mean, Platt's line"
    prep = prep or pma.prep
    x, fs = read_ecg(path, prep.leads)
    assert fs == prep.fs
    starts = [0] if x.shape[1] == 500 else [0, x.shape[1]-500]
    w = np.stack([x[:,s:s+500] for s in starts]).astype(np.float64)
    w = (w - w.mean(2, keepdims=True))/(w.std(2, keepdims=True) + 1e-8)
    with torch.no_grad(): y = pma.model.eval()(torch.as_tensor(w.astype(np.float32)))
    p = (1/(1 + np.exp(-y.numpy().astype(np.float64)))).mean(0)
    return 1/(1 + np.exp(-(np.array(pma.calibration.a)*np.log(p/(1-p)) + pma.calibration.b)))

def test_a_record_as_the_preprocessing_says(pma, tmp_path):
    for x in (ECG, ECG[:,:500], ECG[:,:777]):
        got = pma.predict(path := written(tmp_path/'r', x))
        np.testing.assert_allclose(got.probability, by_hand(pma, path), rtol=0, atol=1e-5)
        assert got.n_windows == (1 if x.shape[1] == 500 else 2) and not got.warnings

def test_the_order_of_leads_in_a_file(pma, tmp_path):
    want = pma.predict(written(tmp_path/'r'))
    for seed in range(3):
        p = np.random.default_rng(seed).permutation(12)
        got = pma.predict(written(tmp_path/f's{seed}', ECG[p], leads=[PTBXL_LEADS[i] for i in p]))
        assert got.probability.equals(want.probability) and got.gate.equals(want.gate)
    other = pma.predict(written(tmp_path/'t', ECG[::-1]))                          # the wrong names for the leads are noticed by no one, and change something
    assert not np.allclose(other.probability, want.probability, atol=1e-4)
    spelt = pma.predict(written(tmp_path/'u', leads=['i', 'Ii', 'III', 'aVR', 'avl', 'AVF', *(f'v{i}' for i in range(1, 7))]))
    assert spelt.probability.equals(want.probability)

def test_missing_and_foreign_leads(pma, tmp_path):
    want = pma.predict(written(tmp_path/'r')).probability
    without = lambda *gone: written(tmp_path/'w', ECG[[i for i,l in enumerate(PTBXL_LEADS) if l not in gone]], leads=[l for l in PTBXL_LEADS if l not in gone])
    head = (twice := written(tmp_path/'d')).with_name('d.hea')
    head.write_text(head.read_text().replace(' V6\n', ' V1\n'))
    for path,said in ((lambda: without('V3'), 'lead V3 is missing'), (lambda: without('III', 'AVR'), 'lead III is missing'), (lambda: written(tmp_path/'n', leads=[*PTBXL_LEADS[:11], 'X']), 'lead V6 is missing'), (lambda: twice, 'V1')):
        with pytest.raises(BadRecord, match=said): pma.predict(path())
    with_prep = lambda **kw: replace(pma, prep=replace(pma.prep, **kw))
    np.testing.assert_allclose(with_prep(derive=True).predict(without('III', 'AVR', 'AVL', 'AVF')).probability, want, rtol=0, atol=5e-3)
    holes = with_prep(missing='nan').predict(without('V3'))
    assert np.isfinite(holes.probability).all() and not np.allclose(holes.probability, want, atol=1e-5) and holes.warnings == ['leads: V3 not recorded, the model sees 0 in their place']

def test_other_rates(pma, tmp_path):
    a, b = (simulate_ecg(('IMI',), fs=fs, rng=5, seconds=10, noise=False) for fs in (100, 500))
    want, got = pma.predict(written(tmp_path/'a', a)), pma.predict(written(tmp_path/'b', b, fs=500))
    np.testing.assert_allclose(got.probability, want.probability, rtol=0, atol=.01)
    assert got.n_windows == 2 and not any(w.startswith('rate') for w in got.warnings)
    with pytest.raises(BadRecord, match='500'): pma.predict(written(tmp_path/'c', b[:,:2000], fs=500))        # four seconds
    low = pma.predict(written(tmp_path/'e', a[:,::2], fs=50))
    assert any('recorded at 50 Hz' in w for w in low.warnings)

def test_other_lengths(pma, tmp_path):
    short, long = written(tmp_path/'s', ECG[:,:300]), written(tmp_path/'l', ECG)
    with pytest.raises(BadRecord, match='300 samples at 100 Hz, expected 500'): pma.predict(short)
    padded = replace(pma, prep=replace(pma.prep, pad=True)).predict(short)
    assert np.isfinite(padded.probability).all() and any('padded to 5 s' in w for w in padded.warnings)
    with pytest.raises(BadRecord, match='stride'): replace(pma, prep=replace(pma.prep, stride=None)).predict(long)
    assert replace(pma, prep=replace(pma.prep, stride=100)).predict(long).n_windows == 6
    most = replace(pma, aggregate='max', calibration=None, thresholds=None).predict(long).probability
    mean = replace(pma, calibration=None, thresholds=None).predict(long).probability
    assert (most > mean).any() and (most >= mean).all()

def test_samples_that_were_not_recorded(pma, tmp_path):
    x = ECG.copy(); x[3, 100:120] = np.nan
    path = written(tmp_path/'h', x)
    with pytest.raises(BadRecord, match='lead aVR has 20 invalid samples|lead AVR has 20 invalid samples'): pma.predict(path)
    p = replace(pma, prep=replace(pma.prep, missing='nan')).predict(path)
    assert np.isfinite(p.probability).all() and not np.allclose(p.probability, pma.predict(written(tmp_path/'r')).probability, atol=1e-6)
    t = pma.predict([path, tmp_path/'r'])
    assert t.probability.isna().all(axis=1).tolist() == [True, False] and 'invalid samples' in t.record.error.iloc[0]
    with pytest.raises(BadRecord, match='finite'): pma.predict(pd.DataFrame(ECG.T, columns=list(PTBXL_LEADS)).replace(ECG[0,0], np.inf), fs=100)

@pytest.mark.parametrize('units,gain', [('uV', 1.), ('V', 1e6), ('mV', 1000.)])
def test_units(units, gain, pma, tmp_path):
    got, want = pma.predict(written(tmp_path/'u', units=units, gain=gain)), pma.predict(written(tmp_path/'r'))
    np.testing.assert_allclose(got.probability, want.probability, rtol=0, atol=1e-6)
    np.testing.assert_allclose(replace(pma, prep=replace(pma.prep, standardize='none')).predict(tmp_path/'u').probability, replace(pma, prep=replace(pma.prep, standardize='none')).predict(tmp_path/'r').probability, rtol=0, atol=1e-5)
