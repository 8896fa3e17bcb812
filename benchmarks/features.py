"""What the feature cache is worth: heads trained on features computed once against heads behind a running encoder

    OMP_NUM_THREADS=1 python benchmarks/features.py [--records 320] [--turns 5] [--sizes tiny small]

Made-up records of 12 leads x 1,000 samples, four fifths of them for training; frozen `ViT1d`. Seconds are those of this process on the processor, so other work on the machine counts less. Ratios are medians over the
turns with the lowest and the highest; who goes first alternates.

epoch    one epoch of training the paper's PMA head (fastai's loop, batches of 64, validation left out) with the encoder running each time, and on cached features; `pays after` is the number of epochs after which the pass
         that fills the cache has paid for itself
layers   a ridge probe of every layer: one pass and one cache, against an encoder pass for each layer (probing code the same)
again    a second call of `layer_features` with `cache=`: checks everything, reads a file, against the first
"""
import argparse, tempfile, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from statistics import median
from time import process_time
import numpy as np, torch
from fastai.callback.core import Callback, CancelValidException
from fastai_ecg_pma.compare import frozen_learner
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.features import layer_features
from fastai_ecg_pma.learner import pma_learner
from fastai_ecg_pma.probe import probe_layers
from fastai_ecg_pma.records import Preprocess

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException()

def seconds(f):
    start = process_time(); f()
    return process_time() - start

def turns(a, b, n):
    "Seconds of `a` and `b` in `n` turns, after one that is not counted"
    a(); b()
    return [(seconds(a), seconds(b)) if i % 2 else tuple(reversed((seconds(b), seconds(a)))) for i in range(n)]

def epoch_of(learn):
    def f():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=NoValidation())
    return f

def said(name, ts, extra=''):
    r = [a/b for a,b in ts]
    print(f'{name:22} {median(a for a,_ in ts):9.3f} s {median(b for _,b in ts):9.4f} s {median(r):7.1f} times faster ({min(r):.1f} to {max(r):.1f}){extra}', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--records', type=int, default=320)
    p.add_argument('--turns', type=int, default=5)
    p.add_argument('--sizes', nargs='+', default=['tiny', 'small'])
    args = p.parse_args()
    rng, n = np.random.default_rng(0), args.records
    dls = ecg_dls(rng.standard_normal((n, 12, 1000), np.float32), rng.integers(0, 2, (n, 5)).astype(np.float32), list('abcde'), np.arange(n) >= n*4//5, Preprocess(), bs=64)
    print(f'{n} records, {args.turns} turns, {torch.get_num_threads()} thread(s), torch {torch.__version__}')
    for size in args.sizes:
        torch.manual_seed(0)
        enc = make_vit(dls, size)
        feats = layer_features(enc, dls)
        live, cached = pma_learner(dls, enc, seed=0), frozen_learner(feats)
        ts, fill = turns(epoch_of(live), epoch_of(cached), args.turns), seconds(lambda: layer_features(enc, dls))
        said(f'{size}, epoch', ts, f', pays after {fill/median(a-b for a,b in ts):.1f} epochs')
        L = enc.n_layers
        apart = lambda: [probe_layers(layer_features(enc, dls, layers=list(range(max(1, l-1), max(2, l)+1))), n=0) for l in range(1, L+1)]
        said(f'{size}, {L} layers', turns(apart, lambda: probe_layers(enc, dls, n=0), max(1, args.turns//2)))
        with tempfile.TemporaryDirectory() as kept:
            layer_features(enc, dls, cache=kept)
            said(f'{size}, again', turns(lambda: layer_features(enc, dls), lambda: layer_features(enc, dls, cache=kept), max(1, args.turns//2)))
