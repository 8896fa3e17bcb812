"""Training that is killed, again and again, ends as if nothing had been. `python tests/test_checkpoint.py 200 SEED` kills 200 times"""
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore', '.*torch.jit.script')
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, TfmdDL
from fastai.optimizer import Adam, Lookahead, OptimWrapper, SGD, ranger
from fastai.torch_core import set_seed
from fastcore.foundation import L
from tsai.data.core import get_ts_dls

from fastai_ecg_pma import checkpoint, files, tensorfile
from fastai_ecg_pma.adam import FusedAdam
from fastai_ecg_pma.augment import Noise
from fastai_ecg_pma.checkpoint import Checkpoint, FellBack, OtherConditions, OtherRun, load_best
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.finite import NonFinite, StopOnNonFinite
from fastai_ecg_pma.learner import pma_learner, pretrain_learner
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse
from fastai_ecg_pma.pretrain import MaskPatches, PretrainLearner
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.state import training_state
from fastai_ecg_pma.tensors import pack
from fastai_ecg_pma.tune import EMA
from fastai_ecg_pma.vit1d import ViT1d
from fastai_ecg_pma.windows import RANDOM, EcgArray, InMemory

EVERY = 2
FITS = dict(
    fit=lambda learn: learn.fit(3, 1e-3),
    fit_one_cycle=lambda learn: learn.fit_one_cycle(3, 1e-3),
    fit_flat_cos=lambda learn: learn.fit_flat_cos(3, 1e-3),
    fine_tune=lambda learn: learn.fine_tune(2, 1e-3, freeze_epochs=2))


# ---- a small training with all that draws random numbers

def make_dls(n_workers=0, labels=False, scale=1, noise=.1, valid_bs=6):
    rng = np.random.default_rng(0)
    prep = Preprocess(seq_len=100)
    x = EcgArray(InMemory([scale*rng.standard_normal((12, 150), dtype=np.float32) for _ in range(27)]), starts=np.where(np.arange(27) < 6, 0, RANDOM), prep=prep)
    y = dict(y=rng.integers(0, 2, (27, 2)), vocab=['a', 'b']) if labels else {}
    dls = ecg_dls(x, valid=np.arange(27) < 6, prep=prep, bs=4, num_workers=n_workers, batch_tfms=[Noise(noise)], **y)
    dls.loaders[1] = dls.valid.new(bs=valid_bs)
    return dls


class Dropped(MAE):
    "An autoencoder with dropout before it"
    def __init__(self, *args, **kw): super().__init__(*args, **kw); self.drop = torch.nn.Dropout(.1)
    def forward(self, x, mask): return super().forward(self.drop(x), mask)


def encoder(): return ViT1d(100, 25, d=16, n_layers=2, n_heads=1)


def pretrainer(cbs=(), n_workers=0, dls=None, seed=0, loss_func=masked_mse, opt_func=partial(FusedAdam, sqr_mom=.95), **kw):
    dls = dls or make_dls(n_workers)
    set_seed(seed)
    return PretrainLearner(dls, Dropped(encoder(), d=16, n_layers=1, n_heads=1), loss_func=loss_func, opt_func=opt_func, cbs=[MaskPatches(25, .5), *cbs], **kw)


def reader(cbs=(), n_workers=0, **kw):
    dls = make_dls(n_workers, labels=True)
    set_seed(0)
    return pma_learner(dls, encoder(), cbs=cbs, pretrained=True, **kw)


def make(kind, cbs, n_workers): return (reader if kind == 'fine_tune' else pretrainer)(cbs, n_workers)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn


def result(learn):
    "Hashes of all that a training ends with: weights, optimiser, gradients, curves, callbacks and random numbers"
    state = training_state(learn)
    state['curves'].pop('time')
    state['loaders'] = [s['epoch_seed'] for s in state['loaders']]
    out = {}
    for k,v in state.items():
        plain, tensors = pack(v)
        out[k] = hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
        out |= {f'{k}.{n}': hashlib.sha256(str((t.dtype, t.shape)).encode() + t.contiguous().numpy().tobytes()).hexdigest()[:16] for n,t in tensors.items()}
    return {**out, 'table': [[float(x) for x in v] for v in learn.recorder.values]}


def differing(a, b): return [k for k in {**a, **b} if a.get(k) != b.get(k)]


# ---- interrupted by an error, in one process

class At(Callback):
    "Does something at the `n`-th training batch of the first fit, or of another"
    order, run_valid = 998, False
    def __init__(self, n, act, fit=0): self._at, self._act, self._fit = n, act, fit
    def after_batch(self):
        if self.train_iter == self._at and self.learn.checkpoint.n_done == self._fit: self._act()


class Boom(RuntimeError): pass
def boom(): raise Boom('boom')


def interrupted(folder, make, f, at, fit=0, **kw):
    "A training that an error ends at batch `at`, and the learner that went on with it"
    with pytest.raises(Boom): quiet(make([At(at, boom, fit), Checkpoint(folder, **kw)]), f)
    return quiet(make([At(0, boom), Checkpoint(folder, **kw)]), f)


def uninterrupted(make, f, folder, **kw): return quiet(make([At(0, boom), Checkpoint(folder, **kw)]), f)


def same(tmp_path, make, f, at, fit=0, **kw):
    "What differs between an uninterrupted training and one that was interrupted"
    return differing(result(uninterrupted(make, f, tmp_path/'a', **kw)), result(interrupted(tmp_path/'b', make, f, at, fit, **kw)))


VARIANTS = dict(
    plain={}, average=dict(cbs=lambda: [EMA(.7)]), average_of_a_read_out=dict(make=reader, cbs=lambda: [EMA(.7)], f=FITS['fine_tune'], fit=1), batchnorm=dict(make=reader), accumulation=dict(cbs=lambda: [GradientAccumulation(12)]), clip=dict(cbs=lambda: [GradientClip(.1)]),
    accumulation_left_over=dict(cbs=lambda: [GradientAccumulation(1000)]), early=dict(cbs=lambda: [EarlyStoppingCallback(patience=1, min_delta=9)], f=lambda l: l.fit(5, 1e-3), at=7),
    plateau=dict(cbs=lambda: [ReduceLROnPlateau(patience=1, min_delta=9)], f=lambda l: l.fit(4, 1e-3), at=17), sgd=dict(opt_func=partial(SGD, mom=.9)), lookahead=dict(opt_func=partial(ranger, k=3)),
    adam=dict(opt_func=Adam), around_fused=dict(opt_func=lambda ps, lr: Lookahead(FusedAdam(ps, lr), k=3)), torch_adam=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), train_metrics=dict(train_metrics=True, metrics=lambda pred, patches, mask: (pred - patches).abs().mean()),
    freezes=dict(cbs=lambda: [Freezes()], at=13),
    two_fits=dict(f=lambda l: (l.fit(2, 1e-3), l.fit_one_cycle(2, 1e-3)), fit=1, at=7), freeze_after=dict(make=reader, f=lambda l: (l.unfreeze(), l.fit(1, 1e-3), l.freeze(), l.fit(2, 1e-3)), fit=1, at=7))


@pytest.mark.parametrize('every', [1, 3, None])
@pytest.mark.parametrize('name', VARIANTS)
def test_interrupted_equals_uninterrupted(tmp_path, name, every):
    v = dict(VARIANTS[name])
    build, f, at, fit, more = v.pop('make', pretrainer), v.pop('f', FITS['fit_one_cycle']), v.pop('at', 8), v.pop('fit', 0), v.pop('cbs', list)
    if train_metrics := v.pop('train_metrics', False): more = lambda: [TrainMetrics()]
    assert same(tmp_path, lambda cbs: build([*more(), *cbs], **v), f, at, fit, every=every) == []


class Freezes(Callback):
    "Freezes a parameter in the middle of a fit"
    order = 30
    def before_epoch(self):
        if self.epoch == 1: next(self.model.parameters()).requires_grad_(False)


class TrainMetrics(Callback):
    "Measures metrics in training, too"
    order = -20
    def before_fit(self): self.recorder.train_metrics = True


def test_a_scaler_goes_on_with_its_scale(tmp_path):
    learn = interrupted(tmp_path/'a', lambda cbs: pretrainer([CpuScaler(), *cbs]), FITS['fit'], 8, every=1)
    assert learn.cpu_scaler.seen == [2.**(2+n//3) for n in range(1, 16)]
    assert same(tmp_path/'b', lambda cbs: pretrainer([CpuScaler(), *cbs]), FITS['fit'], 8, every=1) == []


class CpuScaler(MixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU: the scale doubles every third step"
    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales, self.seen = torch.autocast('cpu', dtype=torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=4., growth_interval=3), L(), []
    def after_step(self):
        super().after_step()
        self.seen.append(self.learn.scaler.get_scale())


def tsai_loaders(x): return get_ts_dls(x, splits=(list(range(16)), list(range(16, 20))), bs=4)
def fastai_loaders(x): return DataLoaders(*(TfmdDL([(torch.from_numpy(r),) for r in part], bs=4, shuffle=len(part) > 4, num_workers=0) for part in (x[:16], x[16:])))


@pytest.mark.parametrize('loaders', [tsai_loaders, fastai_loaders])
def test_other_loaders_go_on_at_the_end_of_an_epoch(tmp_path, loaders):
    def build(cbs):
        set_seed(0)
        return pretrainer(cbs, dls=loaders(np.random.default_rng(0).standard_normal((20, 12, 100)).astype(np.float32)))
    assert same(tmp_path, build, FITS['fit_one_cycle'], 7) == []
    with pytest.raises(ValueError, match='every=2 needs the loaders of `ecg_dls` or `wfdb_dls`'): quiet(build([Checkpoint(tmp_path/'c', every=2)]), FITS['fit'])


def test_validation_prediction_and_lr_find_between_fits(tmp_path):
    def f(learn):
        learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None)
        learn.fit(2, 1e-3)
        learn.validate(); learn.get_preds()
        learn.fit_one_cycle(2, 1e-3)
    build = partial(pretrainer, path=tmp_path)
    assert same(tmp_path, build, f, 8, fit=1, every=3) == []
    assert same(tmp_path/'early', build, f, 8, fit=0, every=3) == []


def test_what_a_script_does_between_fits_sees_the_right_weights(tmp_path):
    seen = []
    def f(learn):
        learn.fit(1, 1e-3); seen.append(result(learn))
        learn.fit(2, 1e-3)
    interrupted(tmp_path/'b', pretrainer, f, 7, fit=1)
    assert differing(*seen) == []


def test_what_others_load_at_the_end_of_a_fit_that_is_passed_over_does_not_count(tmp_path):
    seen = []
    def f(learn):
        for rate in (1e-3, 2e-3):                                                   # the second fit writes over the file that the first one's callback loads
            learn.fit(2, rate, cbs=SaveModelCallback())
            seen.append(result(learn))
    for _ in range(2): uninterrupted(partial(pretrainer, path=tmp_path), f, tmp_path/'a')
    assert differing(seen[0], seen[2]) == [] and differing(seen[1], seen[3]) == [] and differing(seen[0], seen[1]) != []


def test_the_same_learner_goes_on_after_an_interruption(tmp_path):
    want = result(uninterrupted(pretrainer, FITS['fit_one_cycle'], tmp_path/'a', every=2))
    learn = pretrainer([At(9, boom), Checkpoint(tmp_path/'b', every=2)])
    with pytest.raises(Boom): quiet(learn, FITS['fit_one_cycle'])
    learn.at._at = 0
    assert differing(want, result(quiet(learn, FITS['fit_one_cycle']))) == []


def test_an_older_learner_of_the_process_may_not_write_on(tmp_path):
    def other(): quiet(pretrainer([Checkpoint(tmp_path/'a', ignore=[At])]), FITS['fit'])
    with pytest.raises(RuntimeError, match='another learner of this process has begun'): quiet(pretrainer([At(7, other), Checkpoint(tmp_path/'a', ignore=[At])]), FITS['fit'])


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for keep in (1, 3):
        learn = uninterrupted(pretrainer, lambda l: (l.fit(3, 1e-3), l.fit(1, 5.)), tmp_path/str(keep), keep=keep, every=2)
        names = [p.name.split('-')[0] for p in (tmp_path/str(keep)).glob('fit*')]
        assert Counter(names) == {'fit0': keep, 'fit1': keep}
    values = [v[1] for v in uninterrupted(pretrainer, lambda l: l.fit(3, 1e-3), tmp_path/'c').recorder.values]
    best = load_best(learn, tmp_path/'3')
    assert best['value'] == min(values) and best['fit'] == 0                    # the second fit, at a rate of 5, made it worse
    with learn.no_bar(): assert learn.validate()[0] == pytest.approx(min(values), abs=1e-6)


def test_best_weights_are_those_of_the_epoch_where_others_load_theirs_at_the_end(tmp_path):
    cbs = [SaveModelCallback(monitor='train_loss', comp=np.greater), EarlyStoppingCallback(monitor='train_loss', comp=np.greater, patience=2)]      # it keeps the worst, and ends the fit
    learn = quiet(pretrainer([*cbs, Checkpoint(tmp_path/'a')], path=tmp_path), lambda l: l.fit(9, 1e-3))
    values = [v[1] for v in learn.recorder.values]
    assert len(values) == 3 and load_best(learn, tmp_path/'a')['epoch'] == np.argmin(values) == 2, values
    with learn.no_bar(): assert learn.validate()[0] == pytest.approx(min(values), abs=1e-6)


def test_weights_of_another_model_are_not_loaded(tmp_path):
    uninterrupted(pretrainer, FITS['fit'], tmp_path/'a')
    learn = reader()
    with pytest.raises(ValueError, match='has the weights of another model: .* was .* and is absent now'): load_best(learn, tmp_path/'a')


REFUSED = {
    'train signals was': dict(dls=lambda: make_dls(scale=2)), 'model was Dropped and is FusedModel': dict(make=reader), 'Noise.sd was 0.1 and is 0.2 now': dict(dls=lambda: make_dls(noise=.2)),
    'valid.bs was 6 and is 4 now': dict(dls=lambda: make_dls(valid_bs=4)), 'optimiser.wd was': dict(wd=.2), 'optimiser.lr was': dict(f=lambda l: l.fit(3, 2e-3)),
    r'ParamScheduler.lr was \[': dict(base=FITS['fit_flat_cos'], f=lambda l: l.fit_flat_cos(3, 1e-3, pct_start=.5)), "callbacks was .*, 'ParamScheduler'. now": dict(f=FITS['fit_flat_cos']), 'loss was': dict(loss_func=lambda pred, patches, mask: masked_mse(pred, patches, mask)),
    "callbacks was": dict(cbs=[GradientClip()]), 'seed was absent and is 3 now': dict(seed_attr=3), 'print was .*Dropout': dict(drop=.2), "loss was \\['masked_mse', {'standardize': True}\\] and is \\['masked_mse', {'standardize': False}\\] now": dict(base_loss=partial(masked_mse, standardize=True), loss_func=partial(masked_mse, standardize=False)), 'n_epoch was 3 and is 4 now': dict(f=lambda l: l.fit(4, 1e-3)),
    'model.*trained and is .*now': dict(freeze=True)}


@pytest.mark.parametrize('said', REFUSED)
def test_another_run_is_refused_by_name(tmp_path, said):
    v = dict(REFUSED[said])
    uninterrupted(partial(pretrainer, loss_func=v.pop('base_loss', masked_mse)), v.pop('base', FITS['fit']), tmp_path/'a')
    before = {p: p.read_bytes() for p in (tmp_path/'a').glob('*.safetensors')}
    f, build, drop, seed, freeze = v.pop('f', FITS['fit']), v.pop('make', pretrainer), v.pop('drop', None), v.pop('seed_attr', None), v.pop('freeze', False)
    if 'dls' in v: v['dls'] = v['dls']()
    learn = build([*v.pop('cbs', []), At(0, boom), Checkpoint(tmp_path/'a')], **v)
    if drop: learn.model.drop.p = drop
    if seed: learn.seed = seed
    if freeze: next(learn.model.parameters()).requires_grad_(False)
    with pytest.raises(OtherRun, match=said): quiet(learn, f)
    assert {p: p.read_bytes() for p in (tmp_path/'a').glob('*.safetensors')} == before


def test_a_file_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    class Os:
        def __getattr__(self, k): return getattr(os, k)
        def fsync(self, fd): calls.append(('fsync', Path(os.readlink(f'/proc/self/fd/{fd}')).name, os.fstat(fd).st_size)); os.fsync(fd)
        def replace(self, a, b): calls.append(('replace', Path(a).name, Path(b).name)); os.replace(a, b)
    fake = Os()
    for m in (tensorfile, files): monkeypatch.setattr(m, 'os', fake)
    tensorfile.write_tensors(tmp_path/'x.safetensors', dict(a=torch.zeros(9)))
    assert [c[:2] for c in calls] == [('fsync', 'x.safetensors.tmp'), ('replace', 'x.safetensors.tmp'), ('fsync', tmp_path.name)]
    assert calls[0][2] == (tmp_path/'x.safetensors').stat().st_size                # all of it was handed to the system before


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path/'a').mkdir()
    for n in ('fit0-epoch000777-batch000000000.safetensors.tmp', 'mine.txt'): (tmp_path/'a'/n).write_text('x')
    uninterrupted(pretrainer, FITS['fit'], tmp_path/'a')
    assert not list((tmp_path/'a').glob('*.tmp')) and (tmp_path/'a'/'mine.txt').exists()


class Buffers(Callback):
    "A buffer that no state dict has, and the forward pass reads"
    order, run_valid = 30, False
    def before_batch(self): self.learn.xb = (self.xb[0]*(1 + .01*self.model.calls), *self.xb[1:]); self.model.calls += 1


def test_buffers_that_a_state_dict_leaves_out(tmp_path):
    def build(cbs):
        learn = pretrainer([Buffers(), *cbs])
        learn.model.register_buffer('calls', torch.zeros(()), persistent=False)
        return learn
    assert 'calls' not in build([]).model.state_dict() and same(tmp_path, build, FITS['fit'], 8, every=3) == []


def test_fits_are_counted_by_learner_where_each_brings_its_own(tmp_path):
    def f(learn):
        for rate in (1e-3, 1e-3): learn.fit(2, rate, cbs=[Checkpoint(tmp_path/'a', every=2), Log(tmp_path/'log')])
    want = result(quiet(pretrainer(), f))
    assert len((tmp_path/'log').read_text().splitlines()) == 20
    assert differing(want, result(quiet(pretrainer(), f))) == [] and len((tmp_path/'log').read_text().splitlines()) == 20


def test_interrupted_before_the_first_epoch_is_over(tmp_path):
    "The weights that a run without a seed began with are kept from the start"
    with pytest.raises(Boom): quiet(pretrainer([At(2, boom), Checkpoint(tmp_path/'a')]), FITS['fit'])
    assert differing(result(uninterrupted(pretrainer, FITS['fit'], tmp_path/'b')), result(uninterrupted(partial(pretrainer, seed=7), FITS['fit'], tmp_path/'a'))) == []


@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: b''])
def test_a_damaged_checkpoint_in_the_middle_of_a_fit(tmp_path, damage):
    with pytest.raises(Boom): quiet(pretrainer([At(9, boom), Checkpoint(tmp_path/'a', every=2)]), FITS['fit'])
    *_, before, last = sorted((tmp_path/'a').glob('fit0-*.safetensors'))
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(FellBack, match=f'{last.name} is damaged.*goes on from the one before, {before.name}'): got = uninterrupted(pretrainer, FITS['fit'], tmp_path/'a', every=2)
    assert differing(result(uninterrupted(pretrainer, FITS['fit'], tmp_path/'b')), result(got)) == []


def test_other_workers_are_the_same_run(tmp_path):
    want = result(uninterrupted(pretrainer, FITS['fit'], tmp_path/'a', every=2))
    with pytest.raises(Boom): quiet(pretrainer([At(8, boom), Checkpoint(tmp_path/'b', every=2)], n_workers=1), FITS['fit'])
    assert differing(want, result(quiet(pretrainer([At(0, boom), Checkpoint(tmp_path/'b', every=2)]), FITS['fit']))) == []


def test_other_conditions_are_warned_of(tmp_path, monkeypatch):
    uninterrupted(pretrainer, FITS['fit'], tmp_path/'a')
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads+3)
    with pytest.warns(OtherConditions, match=f'threads was {threads} and is {threads+3} now'): uninterrupted(pretrainer, FITS['fit'], tmp_path/'a')


def test_the_printed_table_is_whole(tmp_path):
    said = []
    def f(learn): learn.logger = lambda row: said.append(list(row)[:3]); learn.fit(3, 1e-3)
    def run(cbs):
        learn = pretrainer(cbs)
        learn.remove_cb(learn.progress)
        f(learn)
        return learn
    run([At(0, boom), Checkpoint(tmp_path/'a')])
    want, said[:] = list(said), []
    with pytest.raises(Boom): run([At(13, boom), Checkpoint(tmp_path/'b')])
    assert said == want[:2]
    said.clear(); run([At(0, boom), Checkpoint(tmp_path/'b')])
    assert said == want and len(want) == 3


def test_progress_bars_that_are_shown(tmp_path, capsys):
    def rows(): return [l for l in capsys.readouterr().out.replace('\r', '\n').splitlines() if l[:1].isdigit()]
    with pytest.raises(Boom): pretrainer([At(13, boom), Checkpoint(tmp_path, every=2)]).fit_one_cycle(4, 1e-3)
    begun = rows()
    pretrainer([At(0, boom), Checkpoint(tmp_path, every=2)]).fit_one_cycle(4, 1e-3)
    on = rows()
    pretrainer([At(0, boom), Checkpoint(tmp_path, every=2)]).fit_one_cycle(4, 1e-3)
    assert len(begun) == 2 and on[:2] == begun and [r.split()[0] for r in on] == list('0123') and rows() == on


class Ema(Callback):
    "A callback with a module of its own, which a checkpoint would not see"
    order, run_valid = 40, False
    def before_fit(self): self.slow = torch.nn.Linear(2, 2)


class KeptEma(Ema):
    def after_batch(self):
        with torch.no_grad(): self.slow.weight += self.loss
    def state(self): return dict(weight=self.slow.weight)
    def load_state(self, d): self.slow.weight.data.copy_(d['weight'])


def test_callbacks_say_what_they_keep(tmp_path):
    with pytest.raises(ValueError, match=r'Ema.slow is a module, which a checkpoint would lose: give the callback `state\(\)`'): uninterrupted(lambda cbs: pretrainer([Ema(), *cbs]), FITS['fit'], tmp_path/'c')
    assert same(tmp_path, lambda cbs: pretrainer([KeptEma(), *cbs]), FITS['fit'], 8, every=1) == []


# ---- not a number

class Spoil(Callback):
    "Makes something not finite at the fourth batch"
    order, run_valid = 500, False
    def __init__(self, where): self.where = where
    def before_batch(self):
        if self.where == 'x' and self.learn.iter == 3: self.learn.xb[0][1, 2, 3] = float('nan')
    def after_loss(self):
        if self.where == 'loss' and self.learn.iter == 3: self.learn.loss = self.learn.loss*float('inf')
    def after_backward(self):
        if self.where == 'gradient' and self.learn.iter == 3: next(p for p in reversed(list(self.model.parameters())) if p.grad is not None).grad[0] = float('-inf')


@pytest.mark.parametrize('build', [pretrainer, reader])
@pytest.mark.parametrize('where,value', dict(x='nan', loss='inf', gradient='-inf').items())
def test_training_stops_before_a_step_that_is_not_finite(build, where, value):
    learn = build([Spoil(where), StopOnNonFinite(), Before()])
    with pytest.raises(NonFinite, match=f'the {"gradient" if where == "gradient" else "loss"} is {value} in epoch 0, batch 3') as e: quiet(learn, FITS['fit'])
    rows = [f'row {i}' for i in learn.dls.train.rows(3)]
    assert e.value.records == rows
    assert (f'not finite are in {rows[1]}. ' if where == 'x' else ', '.join(rows)) in str(e.value)
    assert differing(learn.before.state_, {k: t.tolist() for k,t in learn.model.state_dict().items()}) == []


class Before(Callback):
    "The model before each batch"
    order, run_valid = -100, False
    def before_batch(self): self.state_ = {k: t.tolist() for k,t in self.model.state_dict().items()}


def test_records_are_named_after_a_resumption_too(tmp_path):
    learn = pretrainer([At(7, boom), Checkpoint(tmp_path/'a', every=2, ignore=[Spoil])])
    with pytest.raises(Boom): quiet(learn, FITS['fit'])
    learn = pretrainer([At(0, boom), Spoil('x'), Checkpoint(tmp_path/'a', every=2, ignore=[Spoil])])
    with pytest.raises(NonFinite, match='epoch 1, batch 3') as e: quiet(learn, FITS['fit'])
    want = pretrainer([At(9, boom), Checkpoint(tmp_path/'b')])
    with pytest.raises(Boom): quiet(want, FITS['fit'])
    assert e.value.records == [f'row {i}' for i in want.dls.train.rows(3)] and 'finish' not in ' '.join(p.name for p in (tmp_path/'a').iterdir())


def test_a_scaler_may_meet_gradients_that_are_not_finite():
    learn = pretrainer([CpuScaler(), Spoil('gradient'), StopOnNonFinite()])
    quiet(learn, lambda l: l.fit(1, 1e-3))


def test_a_gradient_that_is_large_and_finite_passes():
    class Large(Callback):
        order, run_valid = 500, False
        def after_backward(self): next(self.model.parameters()).grad.fill_(1e30)              # its square is none in float32
    quiet(pretrainer([Large(), StopOnNonFinite()]), lambda l: l.fit(1, 1e-3))


def test_loaders_that_do_not_tell_their_records():
    dls = get_ts_dls(np.full((8, 12, 100), np.nan, np.float32), splits=(list(range(4)), list(range(4, 8))), bs=4)
    with pytest.raises(NonFinite, match='Its records are not known'): quiet(pretrainer([StopOnNonFinite()], dls=dls), FITS['fit'])


# ---- killed for good: every life is a forked process

class Log(Callback):
    "Writes down which batch is trained"
    order = 999
    run_valid = False
    def __init__(self, file): self.file = file
    def before_fit(self): self.n = 0
    def after_batch(self):
        self.n += 1                                     # a state of its own, which a checkpoint has to keep
        with open(self.file, 'a') as f: f.write(f'{os.getpid()} {self.learn.checkpoint.n_done} {self.train_iter} {self.n}\n')


class Seen(Callback):
    "Counts the batches that are trained in this process"
    order, run_valid, n = 999, False, 0
    def after_batch(self): self.n += 1


class Killer:
    "Counts the steps of writing a file, and kills this process and its workers at one of them"
    def __init__(self, at=None): self.n, self.at, self.pieces = 0, at, tensorfile._pieces

    def step(self):
        self.n += 1
        if self.n == self.at: os.killpg(0, signal.SIGKILL)

    def fsync(self, fd): self.step(); os.fsync(fd)
    def replace(self, a, b): self.step(); os.replace(a, b); self.step()
    def __getattr__(self, k): return getattr(os, k)

    def half(self, *args):
        for p in self.pieces(*args):
            yield p[:len(p)//2]
            sys._getframe(1).f_locals['f'].flush()
            self.step()
            yield p[len(p)//2:]

    def install(self): tensorfile.os, tensorfile._pieces = self, self.half


def live(kind, n_workers, folder, at=None):
    "One life, in a process of its own; if it ends it leaves its result"
    torch.set_num_threads(1)
    killer = Killer(at)
    killer.install()
    learn = make(kind, [Log(folder/'log'), Checkpoint(folder/'ckpt', every=EVERY)], n_workers)
    (folder/'ready').write_text('')
    quiet(learn, FITS[kind])
    (folder/'result').write_text(json.dumps(dict(result(learn), steps=killer.n)))


def fork(f):
    "The pid of a new process, in a group of its own, that does `f`"
    if pid := os.fork(): return pid
    os.setsid()
    code = 1
    try: f(); code = 0
    except BaseException as e: sys.stderr.write(f'{type(e).__name__}: {e}\n')
    finally: os._exit(code)


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid, seconds, folder):
    "SIGKILL for a process and its workers, `seconds` after it began to train -> its exit code"
    while not (folder/'ready').exists() and os.waitpid(pid, os.WNOHANG)[0] == 0: time.sleep(.002)
    time.sleep(seconds)
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass
    return ended(pid)


def check_log(folder):
    "Each life began where the last checkpoint was: nothing was skipped, at most `EVERY` batches were trained twice"
    lives, last = {}, (0, 0)
    for pid,fit,i,n in (map(int, l.split()) for l in (folder/'log').read_text().splitlines()):
        assert n == i
        if pid not in lives: assert (fit, i) == (last[0]+1, 1) or fit == last[0] and last[1]-EVERY < i <= last[1]+1, (pid, fit, i, last)
        else: assert (fit, i) in ((lives[pid][0], lives[pid][1]+1), (lives[pid][0]+1, 1)), (pid, fit, i)
        lives[pid], last = (fit, i), max(last, (fit, i))
    return len(lives)


def reference(kind, n_workers):
    folder = Path(tempfile.mkdtemp())
    t = time.time()
    assert ended(fork(lambda: live(kind, n_workers, folder))) == 0
    return dict(json.loads((folder/'result').read_text()), seconds=time.time()-t)


def killed(kind, n_workers, want, rng, n):
    "Kill `n` times, half of them in the middle of a write, then let it end -> number of kills, names of what differs"
    folder, kills = Path(tempfile.mkdtemp()), Counter()
    for i in range(n):
        (folder/'ready').unlink(missing_ok=True)
        writing = i % 2
        left = max(2, int(want['steps']/n*2))
        pid = fork(partial(live, kind, n_workers, folder, rng.randint(1, left) if writing else None))
        code = ended(pid) if writing else kill_after(pid, rng.uniform(0, want['seconds']/n*2), folder)
        if code == 0: break
        assert code == -signal.SIGKILL, code
        kills['in a write' if writing else 'anywhere'] += 1
    if not (folder/'result').exists(): assert ended(fork(lambda: live(kind, n_workers, folder))) == 0
    assert check_log(folder) >= 1
    assert not list((folder/'ckpt').glob('*.damaged'))                             # no kill left half a file under its name
    got = json.loads((folder/'result').read_text())
    return kills, [k for k in differing(want, got) if k not in ('steps', 'seconds')]


def campaign(n, seed=0, kinds=tuple(FITS), workers=(0, 2)):
    rng, kills, bad, want = random.Random(seed), Counter(), [], {}
    while sum(kills.values()) < n:
        for w in workers:
            for kind in kinds:
                if sum(kills.values()) >= n and want.keys() >= {(k, v) for k in kinds for v in workers}: continue
                if (kind, w) not in want: want[kind, w] = reference(kind, w)
                k, odd = killed(kind, w, want[kind, w], rng, 2 if w else 6)
                for where,c in k.items(): kills[f'{kind}, {w} workers, {where}'] += c
                bad += [(kind, w, o) for o in odd]
    for kind in kinds: bad += [(kind, 'workers differ', o) for o in differing(*(want[kind, w] for w in workers)) if o not in ('steps', 'seconds')] if len(workers) > 1 else []
    return dict(kills=kills, total=sum(kills.values()), bad=bad)


def script(*args):
    "This file as a script, in a process that has not computed before it forks"
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, *map(str, args)], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.stdout, r.stderr
    return json.loads(r.stdout)


def test_killed_again_and_again():
    r = script(os.environ.get('ECG_PMA_KILLS', 24), 0)
    assert r['bad'] == [] and r['total'] >= 20
    assert sum(n for k,n in r['kills'].items() if 'in a write' in k) >= 5 and sum(n for k,n in r['kills'].items() if 'anywhere' in k) >= 5


def test_a_full_disk_is_an_error_and_the_last_checkpoint_is_still_there():
    said, left, batches = script('full_disk')
    assert said.startswith('OSError') and 'fit0-epoch000002-batch000000000.safetensors could not be written: File too large. What was there before is as it was' in said
    assert 'fit0-epoch000001-batch000000000.safetensors' in left and not [n for n in left if n.endswith('.tmp')]
    assert batches == 10                                                        # of 15: it went on after the first epoch


def test_two_processes_in_one_folder():
    codes, said, odd = script('two_at_once')
    assert codes == [0, 0] and 'another process is training with checkpoints in' in said and odd == []


def test_workers_left_behind():
    code, odd = script('orphans')
    assert code == -signal.SIGKILL and set(odd) <= {'steps', 'seconds'}


def orphans():
    "Only the process is killed, not its workers, which hold the lock for a while: the next life waits for them"
    folder = Path(tempfile.mkdtemp())
    want = reference('fit', 2)
    pid = fork(partial(live, 'fit', 2, folder))
    while not (folder/'log').exists() or len((folder/'log').read_text().splitlines()) < 3: time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    assert ended(fork(partial(live, 'fit', 2, folder))) == 0
    return code, differing(want, json.loads((folder/'result').read_text()))


def full_disk():
    "Files of this process may not grow beyond a size: the system refuses to write on, as on a full disk"
    folder = Path(tempfile.mkdtemp())

    def until_full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        learn = pretrainer([Checkpoint(folder/'ckpt'), At(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)))])
        try: quiet(learn, FITS['fit_one_cycle'])
        except OSError as e: (folder/'said').write_text(f'{type(e).__name__} {e.errno} {e}')

    def go_on():
        learn = quiet(pretrainer([Checkpoint(folder/'ckpt', ignore=[Seen]), At(0, boom), Seen()]), FITS['fit_one_cycle'])
        (folder/'batches').write_text(str(learn.seen.n))

    assert ended(fork(until_full)) == 0
    left = sorted(p.name for p in (folder/'ckpt').iterdir())
    assert ended(fork(go_on)) == 0
    return (folder/'said').read_text(), left, int((folder/'batches').read_text())


def two_at_once():
    "A second process that trains in the same folder is refused, and the first goes on"
    folder = Path(tempfile.mkdtemp())

    def second():
        checkpoint.LOCK_WAIT = .1
        try: quiet(pretrainer([Checkpoint(folder/'ckpt')]), FITS['fit'])
        except RuntimeError as e: (folder/'said').write_text(str(e))

    def first(name, act):
        learn = quiet(pretrainer([Checkpoint(folder/name), At(6, act)]), FITS['fit'])
        (folder/f'{name}.json').write_text(json.dumps(result(learn)))

    codes = [ended(fork(partial(first, *a))) for a in (('ckpt', lambda: ended(fork(second))), ('alone', lambda: None))]
    return codes, (folder/'said').read_text(), differing(*(json.loads((folder/f'{n}.json').read_text()) for n in ('ckpt', 'alone')))


def cost(size='small'):
    "Seconds and MB of a checkpoint of a ViT pretraining learner, written and read, the median of five; and of a training step"
    folder, times, x = Path(tempfile.mkdtemp()), {}, np.random.default_rng(0).standard_normal((48, 12, 1000)).astype(np.float32)

    def measure():
        c = learn.checkpoint
        def of(name, f): times[name] = sorted(timed(f) for _ in range(5))[2]
        of('save', lambda: c._save(0, 99))
        of('state and pack', lambda: pack(training_state(learn)))
        of('read', lambda: checkpoint._open(c.folder/checkpoint._file(0, 0, 99))[0]())
        times['MB'] = (c.folder/checkpoint._file(0, 0, 99)).stat().st_size/1e6
        of('finite gradient', StopOnNonFinite.before_step.__get__(c))

    dls = ecg_dls(x, valid=np.arange(48) < 16, bs=8, prep=Preprocess())
    learn = pretrain_learner(dls, size=size, ps=50, seed=0, cbs=[Checkpoint(folder/'a'), At(3, measure), Step()])
    quiet(learn, lambda l: l.fit(1, 1e-4))
    return {**times, 'step of 8 records': sorted(learn.step.times)[len(learn.step.times)//2], 'parameters': sum(p.numel() for p in learn.model.parameters())}


def timed(f): t = time.perf_counter(); f(); return time.perf_counter() - t


class Step(Callback):
    order, run_valid = -1, False
    def before_fit(self): self.times = []
    def before_batch(self): self.began = time.perf_counter()
    def after_batch(self): self.times.append(time.perf_counter() - self.began)


if __name__ == '__main__':
    if sys.argv[1:2] and not sys.argv[1].isdigit(): print(json.dumps(dict(orphans=orphans, full_disk=full_disk, two_at_once=two_at_once, cost=cost)[sys.argv[1]](*sys.argv[2:])))
    else:
        r = campaign(*map(int, sys.argv[1:] or [40, 0]))
        print(json.dumps(r, indent=1))
        sys.exit(bool(r['bad']))
