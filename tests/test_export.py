"Every read-out and kind of encoder gives the same outputs in onnxruntime and as a program of torch.export, for any number of windows"
import json
import zipfile
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fastai_ecg_pma.aggregate import GroupMeans, OwnNorm, Together, class_head, linear_head
from fastai_ecg_pma.attend import AttentionPool, Attentive
from fastai_ecg_pma.calibrate import Calibration
from fastai_ecg_pma.thresholds import Thresholds
from fastai_ecg_pma.closed_form import beats_learner, kernels_learner
from fastai_ecg_pma.trees import trees_learner
from fastai_ecg_pma.convnet import convnet_learner
from fastai_ecg_pma.compare import MORE_READOUTS
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.export import WindowModel, check_parity, export_facts, export_onnx, export_program, onnx_runner, program_runner
from fastai_ecg_pma.gate import PMA, ClassPMA, LeadPMA, top_k
from fastai_ecg_pma.gates import prune
from fastai_ecg_pma.layers import class_token, mean_leads, mean_max
from fastai_ecg_pma.learner import pma_learner
from fastai_ecg_pma.decide import predictor
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.synth import synth_ptbxl

pytest.importorskip('onnx', reason='an ONNX file needs it')
pytest.importorskip('onnxruntime', reason='an ONNX file is compared by it')

@pytest.fixture(scope='module')
def dls():
    rng = np.random.default_rng(0)
    return ecg_dls(rng.normal(size=(24,12,100)).astype(np.float32), rng.integers(0, 2, (24,3)).astype(np.float32), list('abc'), np.arange(24) >= 16, Preprocess(seq_len=100), bs=8)

def vit(dls, n_layers=3): return make_vit(dls, ps=25, d=16, n_layers=n_layers, n_heads=2)

tst = dict(n_layers=2, d_model=16, n_heads=2, d_ff=16)
tsit = dict(depth=2, d_model=16, n_heads=2, token_size=25)
CASES = {**{k: (None, v if isinstance(v, dict) else dict(readout=v)) for k,v in MORE_READOUTS.items()},
    'own norms': (None, dict(readout='static', layer_norm=OwnNorm)),
    'LeadPMA': (None, dict(readout=partial(LeadPMA, hidden=(8,8)), pool=mean_leads)),
    'ClassPMA': (None, dict(readout=partial(ClassPMA, n_out=3, hidden=(8,8)), head=class_head)),
    'ClassPMA, leads': (None, dict(readout=partial(ClassPMA, n_out=3, hidden=(8,8)), head=class_head, pool=mean_leads)),
    'attentive, leads': (None, dict(readout=partial(Attentive, n_heads=2, n_leads=12), pool=mean_leads)),
    'attentive, from the last': (None, dict(readout=partial(Attentive, n_heads=2, start='last'))),
    'AttentionPool': (None, dict(readout=PMA, token_pool=AttentionPool)),
    'AttentionPool, leads': (None, dict(readout=partial(LeadPMA, hidden=(8,8)), token_pool=partial(AttentionPool, by_lead=True))),
    'top two': (None, dict(readout=partial(PMA, choose=partial(top_k, k=2)))),
    'groups': (None, dict(readout=partial(GroupMeans, n_groups=2))),
    'some layers': (None, dict(readout=PMA, layers=[1,3])),
    'TSTPlus': ('TSTPlus', dict(readout=PMA, arch_config=tst)),
    'TSTPlus, no padding mask': ('TSTPlus', dict(readout=PMA, arch_config=dict(tst, key_padding_mask=False))),
    'TSTPlus, no residual attention': ('TSTPlus', dict(readout='static', arch_config=dict(tst, res_attention=False))),
    'TSiTPlus': ('TSiTPlus', dict(readout=PMA, arch_config=tsit)),
    'TSiTPlus, class token': ('TSiTPlus', dict(readout='attentive', arch_config=dict(tsit, use_token=True), pool=class_token)),
    'EcgViT': ('EcgViT', dict(readout=PMA, arch_config=dict(ps=25, d=16, n_layers=3))),
    'EcgHybrid': ('EcgHybrid', dict(readout=PMA, arch_config=dict(d=16, n_layers=3, n_heads=1, stem=[8,16], strides=[2,2]))),
    'EcgHybrid, batch norm, mean and maximum': ('EcgHybrid', dict(readout=PMA, pool=mean_max, head=partial(linear_head, drop=.3), arch_config=dict(d=16, n_layers=3, n_heads=1, stem=[8,16], strides=[2,2], norm='batch'))),
    'fused attention': (lambda: torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(100, 4, 32, batch_first=True), 2, enable_nested_tensor=False), dict(readout=PMA))}

def made(dls, case):
    arch, kwargs = CASES[case]
    if isinstance(kwargs['readout'], str): kwargs = {**kwargs, 'readout': MORE_READOUTS[kwargs['readout']]}
    learn = pma_learner(dls, arch() if callable(arch) else arch or vit(dls), seed=0, **kwargs)
    for p in learn.model.head.parameters(): torch.nn.init.normal_(p, std=.3)                 # a fresh head may say the same of all windows
    return learn

@torch.no_grad()
def outputs(model, x):
    "The model's own, in other ways than the export asks for them"
    try: return [model.eval()(x).sigmoid().numpy(), model.weights(x).numpy()]
    except ValueError: return [model(x).sigmoid().numpy()]

@pytest.mark.parametrize('export', [export_onnx, export_program])
@pytest.mark.parametrize('case', CASES)
def test_outputs_are_those_of_the_model(dls, case, export, tmp_path):
    learn = made(dls, case)
    file = export(learn, tmp_path/'m.pt2', check=False)
    run = dict(export_onnx=onnx_runner, export_program=program_runner)[export.__name__](file)
    for n in (1, 2, 3, 7, 33):
        x = torch.randn(n, 12, 100, generator=torch.Generator().manual_seed(n))
        want, got = outputs(learn.model, x), run(x)
        assert [g.shape for g in got] == [w.shape for w in want]
        for w, g in zip(want, got): np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)
        assert n < 7 or want[0].std(0).min() > 1e-4
    assert (len(want) == 1) == (case in ('concatenation', 'groups'))

@pytest.mark.parametrize('export', [export_onnx, export_program])
@pytest.mark.parametrize('task,activation', [('labels', torch.sigmoid), ('class', partial(torch.softmax, dim=-1)), ('numbers', lambda y: y)])
def test_of_each_task(dls, task, activation, export, tmp_path):
    p = replace(predictor(made(dls, 'PMA'), score=False), task=task)
    x = torch.randn(5, 12, 100)
    with torch.no_grad(): want = activation(p.model(x)).numpy()
    got = dict(export_onnx=onnx_runner, export_program=program_runner)[export.__name__](export(p, tmp_path/'m.pt2'))(x)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('export', [export_onnx, export_program])
def test_several_that_answer_together(dls, export, tmp_path):
    members = [*(made(dls, c).model for c in ('PMA', 'concatenation')), kernels_learner(dls, 60, segment=30).model, beats_learner(dls, 60).model, convnet_learner(dls, seed=0).model.eval()]
    p = replace(predictor(made(dls, 'PMA'), score=False), model=Together(members))
    x = torch.randn(5, 12, 100)
    with torch.no_grad(): want = torch.sigmoid(sum(m(x) for m in members)/len(members)).numpy()
    got, = dict(export_onnx=onnx_runner, export_program=program_runner)[export.__name__](export(p, tmp_path/'m.pt2'))(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

@pytest.mark.parametrize('export', [export_onnx, export_program])
@pytest.mark.parametrize('make', [partial(beats_learner, n=60), partial(trees_learner, n_trees=20)])
def test_the_median_beat_in_a_graph(make, export, tmp_path):
    dls = ptbxl_dls(synth_ptbxl(tmp_path/'ecgs', n=60), bs=16)
    p = predictor(make(dls), score=False)
    x = torch.as_tensor(np.asarray(dls.valid.dataset[:][0]))
    want, run = p._outputs(x)[0], dict(export_onnx=onnx_runner, export_program=program_runner)[export.__name__](export(p, tmp_path/'m.pt2'))
    for n in (1, 3, len(x)): np.testing.assert_allclose(run(x[:n])[0], want[:n], rtol=0, atol=1e-5)
    assert want.std(0).min() > 1e-3

def test_the_model_stays_as_it_was(dls, tmp_path):
    learn = made(dls, 'TSTPlus')
    learn.model.train()
    learn.freeze()
    enc, before = learn.model.backbone.encoder, {k: v.clone() for k,v in learn.model.state_dict().items()}
    grad = [p.requires_grad for p in learn.model.parameters()]
    was = learn.model.backbone.special_idx
    masks = [m.key_padding_mask for m in enc.modules() if hasattr(m, 'key_padding_mask')]
    assert 'auto' in masks and not len(was)
    p = predictor(learn, score=False)
    for export in (export_onnx, export_program): export(p, tmp_path/'m')
    assert learn.model.backbone.special_idx is was and [m.key_padding_mask for m in enc.modules() if hasattr(m, 'key_padding_mask')] == masks
    assert [p.requires_grad for p in learn.model.parameters()] == grad and not all(grad)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert torch.backends.mha.get_fastpath_enabled()

@pytest.fixture
def pma(dls):
    p = predictor(made(dls, 'PMA'), score=False, title='Ä', license='mit')
    return replace(p, aggregate='max', calibration=Calibration('platt', list('abc'), a=[1,2,3], b=[0,-.5,.1]), thresholds=Thresholds(tuple('abc'), (.5, .25, np.inf), 'f1'))

def of_onnx(file):
    import onnx
    return {p.key: json.loads(p.value) for p in onnx.load(file).metadata_props}

def of_program(file):
    with zipfile.ZipFile(file) as z: return json.loads(z.read(next(n for n in z.namelist() if n.endswith('extra/facts.json'))))

def test_facts_make_the_parts_again(pma, tmp_path):
    for f in (of_onnx(export_onnx(pma, tmp_path/'m.onnx')), of_program(export_program(pma, tmp_path/'m.pt2'))):
        assert Preprocess.from_dict(f['preprocess']) == pma.prep and f['labels'] == pma.labels and (f['task'], f['aggregate']) == ('labels', 'max')
        assert Calibration.from_dict(f['calibration']) == pma.calibration and Thresholds.from_dict(f['thresholds']) == pma.thresholds
        assert (f['title'], f['license']) == ('Ä', 'mit') and set(f['versions']) > {'python', 'torch', 'fastai_ecg_pma'} and len(f['weights']) == 64
        assert f == json.loads(json.dumps(export_facts(pma)))

def test_the_hash_is_that_of_the_weights(pma):
    other = replace(pma, model=deepcopy(pma.model))
    assert export_facts(pma)['weights'] == export_facts(other)['weights']
    with torch.no_grad(): next(other.model.parameters()).view(-1)[0] += 1e-3
    assert export_facts(pma)['weights'] != export_facts(other)['weights']

def test_a_program_holds_no_pickle(pma, tmp_path):
    with zipfile.ZipFile(export_program(pma, tmp_path/'m.pt2')) as z: parts = {n: z.read(n) for n in z.namelist()}
    assert len(parts) > 20
    assert [n for n,b in parts.items() if b[:2] in (b'PK', b'\x80\x02', b'\x80\x04', b'\x80\x05') or n.endswith('.pkl')] == []
    assert [c for n,b in parts.items() if n.endswith('_config.json') for c in json.loads(b)['config'].values() if c['use_pickle']] == []

def test_pruned_is_smaller_and_equal(dls, tmp_path):
    torch.manual_seed(0)
    learn = pma_learner(dls, vit(dls, 6), partial(PMA, hidden=(8,8)), seed=0)
    with torch.no_grad(): learn.model.head.fuse.gate[-1].bias[2:] = -1e9
    cut, x = replace(predictor(learn, score=False), model=prune(learn)), torch.randn(4, 12, 100)
    for export,runner,end in ((export_onnx, onnx_runner, 'onnx'), (export_program, program_runner, 'pt2')):
        whole, small = export(learn, tmp_path/f'whole.{end}'), export(cut, tmp_path/f'cut.{end}')
        assert small.stat().st_size < .6*whole.stat().st_size
        (a, v), (b, w) = runner(whole)(x), runner(small)(x)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        np.testing.assert_allclose(v[:,:2], w, rtol=0, atol=1e-6)

@pytest.mark.parametrize('change', [lambda y, w: (y+2e-5, w), lambda y, w: (y, w.flip(1)), lambda y, w: (y[:1].expand_as(y), w), lambda y, w: (y, w[:,:1])])
@pytest.mark.parametrize('export', [export_onnx, export_program])
def test_a_graph_that_differs_is_not_kept(pma, export, change, monkeypatch, tmp_path):
    export(pma, tmp_path/'m.pt2')
    was, forward = (tmp_path/'m.pt2').read_bytes(), WindowModel.forward
    monkeypatch.setattr(WindowModel, 'forward', lambda self, x: change(*forward(self, x)))
    with pytest.raises(ValueError, match='the model'): export(pma, tmp_path/'m.pt2')
    assert (tmp_path/'m.pt2').read_bytes() == was and [f.name for f in tmp_path.iterdir()] == ['m.pt2']
    export(pma, tmp_path/'m.pt2', check=False)
    assert (tmp_path/'m.pt2').read_bytes() != was

def test_parity_asks_for_every_output(pma):
    outputs = ['probability', 'gate']
    check_parity(pma, pma._outputs, outputs)
    with pytest.raises(ValueError, match='shorter'): check_parity(pma, lambda x: pma._outputs(x)[:1], outputs)
    with pytest.raises(ValueError, match='gate of 1 windows is .1, 1., the model gives .1, 3.'): check_parity(pma, lambda x: (pma._outputs(x)[0], pma._outputs(x)[1][:,:1]), outputs)
    with pytest.raises(ValueError, match='probability of 1 windows'): check_parity(pma, lambda x: (pma._outputs(x)[0]*np.nan, pma._outputs(x)[1]), outputs)
    with pytest.raises(ValueError, match='of 7 windows'): check_parity(pma, lambda x: pma._outputs(x if len(x) < 7 else x.flip(0)), outputs)

def test_nan_is_refused(pma):
    with pytest.raises(ValueError, match='fill=0'): WindowModel(replace(pma, prep=replace(pma.prep, fill=None)))

@pytest.mark.parametrize('name,check,fails', [('onnx', True, True), ('onnx', False, True), ('onnxruntime', True, True), ('onnxruntime', False, False)])
def test_what_is_missing_is_named(pma, name, check, fails, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, name, None)
    if not fails: assert export_onnx(pma, tmp_path/'m.onnx', check=check).exists(); return
    with pytest.raises(ImportError, match=f'{name} is missing.*pip install onnx onnxruntime'): export_onnx(pma, tmp_path/'m.onnx', check=check)
    assert list(tmp_path.iterdir()) == []
