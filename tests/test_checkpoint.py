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
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import OptimWrapper, SGD, ranger
from fastai.torch_core import set_seed
from tsai.data.core import get_ts_dls

from fastai_ecg_pma import checkpoint
from fastai_ecg_pma.augment import Noise
from fastai_ecg_pma.checkpoint import Checkpoint, FellBack, NonFinite, OtherConditions, OtherRun, StopOnNonFinite, load_best, pack, training_state
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.learner import pma_learner, pretrain_learner
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse
from fastai_ecg_pma.pretrain import MaskPatches, PretrainLearner
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.vit1d import ViT1d
from fastai_ecg_pma.windows import RANDOM, EcgArray, InMemory

EVERY = 2
FITS = dict(
    fit=lambda learn: learn.fit(3, 1e-3),
    fit_one_cycle=lambda learn: learn.fit_one_cycle(3, 1e-3),
    fit_flat_cos=lambda learn: learn.fit_flat_cos(3, 1e-3),
    fine_tune=lambda learn: learn.fine_tune(2, 1e-3, freeze_epochs=2))


# ---- a small training with all that draws random numbers

def make_dls(n_workers=0, labels=False, **kw):
    rng = np.random.default_rng(0)
    prep = Preprocess(seq_len=100)
    x = EcgArray(InMemory([rng.standard_normal((12, 150), dtype=np.float32) for _ in range(27)]), starts=np.where(np.arange(27) < 6, 0, RANDOM), prep=prep)
    y = dict(y=rng.integers(0, 2, (27, 2)), vocab=['a', 'b']) if labels else {}
    return ecg_dls(x, valid=np.arange(27) < 6, prep=prep, bs=4, num_workers=n_workers, batch_tfms=[Noise(.1)], **y, **kw)


class Dropped(MAE):
    "An autoencoder with dropout before it"
    def __init__(self, *args, **kw): super().__init__(*args, **kw); self.drop = torch.nn.Dropout(.1)
    def forward(self, x, mask): return super().forward(self.drop(x), mask)


def encoder(): return ViT1d(100, 25, d=16, n_layers=2, n_heads=1)


def pretrainer(cbs=(), n_workers=0, dls=None, seed=0, **kw):
    dls = dls or make_dls(n_workers)
    set_seed(seed)
    return PretrainLearner(dls, Dropped(encoder(), d=16, n_layers=1, n_heads=1), loss_func=masked_mse, cbs=[MaskPatches(25, .5), *cbs], **kw)


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
    plain={}, batchnorm=dict(make=reader), accumulation=dict(cbs=lambda: [GradientAccumulation(12)]), clip=dict(cbs=lambda: [GradientClip(.1)]),
    accumulation_left_over=dict(cbs=lambda: [GradientAccumulation(1000)]), early=dict(cbs=lambda: [EarlyStoppingCallback(patience=1, min_delta=9)], f=lambda l: l.fit(5, 1e-3), at=7),
    plateau=dict(cbs=lambda: [ReduceLROnPlateau(patience=1, min_delta=9)], f=lambda l: l.fit(4, 1e-3), at=17), sgd=dict(opt_func=partial(SGD, mom=.9)), lookahead=dict(opt_func=partial(ranger, k=3)),
    torch_adam=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), train_metrics=dict(train_metrics=True, metrics=lambda pred, patches, mask: (pred - patches).abs().mean()),
    two_fits=dict(f=lambda l: (l.fit(2, 1e-3), l.fit_one_cycle(2, 1e-3)), fit=1, at=7), freeze_after=dict(make=reader, f=lambda l: (l.unfreeze(), l.fit(1, 1e-3), l.freeze(), l.fit(2, 1e-3)), fit=1, at=7))


@pytest.mark.parametrize('every', [1, 3, None])
@pytest.mark.parametrize('name', VARIANTS)
def test_interrupted_equals_uninterrupted(tmp_path, name, every):
    v = dict(VARIANTS[name])
    build, f, at, fit, more = v.pop('make', pretrainer), v.pop('f', FITS['fit_one_cycle']), v.pop('at', 8), v.pop('fit', 0), v.pop('cbs', list)
    if train_metrics := v.pop('train_metrics', False): more = lambda: [TrainMetrics()]
    assert same(tmp_path, lambda cbs: build([*more(), *cbs], **v), f, at, fit, every=every) == []


class TrainMetrics(Callback):
    "Measures metrics in training, too"
    order = -20
    def before_fit(self): self.recorder.train_metrics = True


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


class Killer:
    "Counts the steps of writing a file, and kills this process and its workers at one of them"
    def __init__(self, at=None): self.n, self.at, self.pieces = 0, at, checkpoint._pieces

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

    def install(self): checkpoint.os, checkpoint._pieces = self, self.half


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
    assert kills.total() == 0 or check_log(folder) >= 1
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
        learn = pretrainer([Checkpoint(folder/'ckpt'), At(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)))])
        try: quiet(learn, FITS['fit_one_cycle'])
        except OSError as e: (folder/'said').write_text(f'{type(e).__name__} {e.errno} {e}')

    assert ended(fork(until_full)) == 0
    left = sorted(p.name for p in (folder/'ckpt').iterdir())
    assert ended(fork(partial(live, 'fit_one_cycle', 0, folder))) == 0
    return (folder/'said').read_text(), left, len((folder/'log').read_text().splitlines())


def two_at_once():
    "A second process that trains in the same folder is refused, and the first goes on"
    folder = Path(tempfile.mkdtemp())

    def second():
        checkpoint.LOCK_WAIT = .1
        try: quiet(pretrainer([Checkpoint(folder/'ckpt')]), FITS['fit'])
        except RuntimeError as e: (folder/'said').write_text(str(e))

    def first():
        learn = pretrainer([Checkpoint(folder/'ckpt'), At(6, lambda: ended(fork(second)))])
        (folder/'result').write_text(json.dumps(result(quiet(learn, FITS['fit']))))
    first_code = ended(fork(first))
    return first_code, (folder/'said').read_text(), differing(json.loads((folder/'result').read_text()), {k: v for k,v in reference('fit', 0).items()})


if __name__ == '__main__':
    if sys.argv[1:2] and not sys.argv[1].isdigit(): print(json.dumps(dict(orphans=orphans, full_disk=full_disk, two_at_once=two_at_once)[sys.argv[1]]()))
    else:
        r = campaign(*map(int, sys.argv[1:] or [40, 0]))
        print(json.dumps(r, indent=1))
        sys.exit(bool(r['bad']))
