"""Three tsai Transformers on one-lead ECGs (PhysioNet/CinC 2017): pretrained by masked modelling, then read from the last layer or from all

    python experiments/cinc2017.py FOLDER --out OUT

FOLDER holds the challenge's WFDB records and REFERENCE.csv (record,label; N normal, A atrial fibrillation, O other, ~ noisy). Each record is read at
100 Hz. One in five records is for validation, drawn within the classes (the challenge names no patients). Encoders are pretrained on all 9-second
windows of the training records; classes are learned from, and scored on, the middle window of each record. Macro-AUROC is one class against the
rest; the difference to the last layer is bootstrapped over the same resampled records. OUT/scores.csv is written as results come.
"""
import argparse
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore', '.*torch.jit.script')
import numpy as np, pandas as pd, torch
from fastai.torch_core import set_seed
from tsai.models.PatchTST import PatchTST
from tsai.models.TSiTPlus import TSiTPlus
from tsai.models.TSTPlus import TSTPlus

from fastai_ecg_pma.aggregate import PPA, Last, PlainNorm, Static
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import build_arch
from fastai_ecg_pma.gate import PMA
from fastai_ecg_pma.intervals import patient_counts
from fastai_ecg_pma.learner import evaluate, pma_learner, pretrain_learner
from fastai_ecg_pma.metrics import class_aurocs, one_hot
from fastai_ecg_pma.probe import frozen_learner, layer_features, probe_layers
from fastai_ecg_pma.records import Preprocess, read_ecg, standardize

FS, LEN, PS = 100, 900, 25
COMMON = dict(d_model=64, n_heads=4)
ARCHS = {'TSTPlus': (TSTPlus, dict(**COMMON, n_layers=4, d_ff=128, res_attention=False, max_seq_len=None, kernel_size=PS, stride=PS)),
         'TSiTPlus': (TSiTPlus, dict(**COMMON, depth=4, mlp_ratio=2, pre_norm=True, token_size=PS)),
         'PatchTST': (PatchTST, dict(**COMMON, n_layers=4, d_ff=128, res_attention=False, patch_len=PS, stride=PS))}
READOUTS = {'last layer': dict(readout=Last), 'PPA': dict(readout=PPA), 'static': dict(readout=Static), 'PMA': dict(readout=PMA),
            'PMA, normed': dict(readout=PMA, layer_norm=PlainNorm)}
TUNED = {k: READOUTS[k] for k in ('last layer', 'PMA', 'PMA, normed')}


def read(folder):
    "Each record's signal at 100 Hz in mV, and its class"
    table = pd.read_csv(folder/'REFERENCE.csv', header=None, names=['record', 'label'])
    return [read_ecg(folder/r, ['ECG'], FS)[0] for r in table.record], table.label.to_numpy()


def windows(x):
    n = x.shape[1]//LEN
    start = (x.shape[1] - n*LEN)//2
    return [standardize(x[:, start+i*LEN:start+(i+1)*LEN], 'lead') for i in range(n)]


def middle(x):
    start = (x.shape[1] - LEN)//2
    return standardize(x[:, start:start+LEN], 'lead')


def held_out(labels, seed=0, share=5):
    "Every fifth record of each class, in an order drawn with `seed`"
    valid, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for c in np.unique(labels): valid[rng.permutation(np.flatnonzero(labels == c))[::share]] = True
    return valid


def probabilities(learn):
    with learn.no_bar(): p, y = learn.get_preds(dl=learn.dls.valid.new(shuffle=False, drop_last=False), reorder=False)
    return p.numpy(), one_hot(y, p.shape[1])


def difference(p, last, y, n=2000):
    "Macro-AUROC of `p` minus that of `last`, with a 95 % interval over the same resamples"
    counts = patient_counts(np.arange(len(y)), n)
    d = np.nanmean(class_aurocs(p, y, counts), 1) - np.nanmean(class_aurocs(last, y, counts), 1)
    point = np.nanmean(class_aurocs(p, y)) - np.nanmean(class_aurocs(last, y))
    return point, *np.quantile(d, [.025, .975])


class Table:
    def __init__(self, path): self.path, self.rows = path, []

    def add(self, **row):
        self.rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        pd.DataFrame(self.rows).to_csv(self.path, index=False)
        print(*self.rows[-1].values(), flush=True)


def compare(train, table, kind, name, encoder, seeds, readouts=READOUTS):
    "Last layer first: the others are compared with its mean probabilities over the seeds"
    last = None
    for what, kwargs in readouts.items():
        ps, points, t0 = [], [], time.perf_counter()
        for seed in seeds:
            set_seed(seed)
            learn = train(encoder, kwargs)
            p, y = probabilities(learn)
            ps.append(p), points.append(evaluate(learn).point)
        p = np.mean(ps, 0)
        last = p if last is None else last
        d, low, high = difference(p, last, y)
        table.add(model=name, encoder=kind, readout=what, mean=float(np.mean(points)), sd=float(np.std(points)), ensemble_minus_last=float(d), low=float(low),
                  high=float(high), seconds=round(time.perf_counter()-t0))


def quiet(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--out', type=Path, default=Path('cinc2017'))
    p.add_argument('--pretrain-epochs', type=int, default=20)
    p.add_argument('--frozen-epochs', type=int, default=30)
    p.add_argument('--tune-epochs', type=int, default=5)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--archs', nargs='+', default=list(ARCHS), choices=list(ARCHS))
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    signals, labels = read(a.folder)
    valid, prep = held_out(labels), Preprocess(leads=['ECG'], fs=FS, seq_len=LEN)
    W = [(w, v) for x, v in zip(signals, valid) for w in windows(x)]
    unlabelled = ecg_dls(np.stack([w for w, _ in W]), valid=np.array([v for _, v in W]), prep=prep, bs=128)
    dls = ecg_dls(np.stack([middle(x) for x in signals]), labels, valid=valid, prep=prep, bs=64)
    print(len(unlabelled.train.dataset), 'windows to pretrain on;', (~valid).sum(), 'records to train on,', valid.sum(), 'to validate on', dict(zip(*np.unique(labels, return_counts=True))), flush=True)
    for name in a.archs: one_arch(name, unlabelled, dls, a)


def one_arch(name, unlabelled, dls, a):
    arch, config = ARCHS[name]
    table = Table(a.out/f'{name}.csv')
    set_seed(0)
    random = build_arch(dls, arch, config)
    pre = pretrain_learner(unlabelled, arch, arch_config=config, ps=PS, ratio=.5, seed=0)
    quiet(pre, lambda l: l.fit_one_cycle(a.pretrain_epochs, 1e-3))
    print(name, 'pretraining loss', [round(v[1], 3) for v in (pre.recorder.values[0], pre.recorder.values[-1])], flush=True)
    torch.save(pre.encoder.state_dict(), a.out/f'{name}.pth')
    for kind, encoder in (('random', random), ('pretrained', pre.encoder)):
        feats = layer_features(encoder, dls)
        probe_layers(feats).assign(model=name, encoder=kind).to_csv(a.out/f'{name}_{kind}_layers.csv', index=False)
        compare(lambda enc, kw: quiet(frozen_learner(feats, **kw), lambda l: l.fit(a.frozen_epochs, 1e-3)), table, f'{kind}, frozen', name, encoder, range(a.seeds))
    tune = lambda enc, kw: quiet(pma_learner(dls, enc, **kw), lambda l: l.fine_tune(a.tune_epochs, 1e-3, freeze_epochs=3))
    if a.tune_epochs: compare(tune, table, 'fine-tuned', name, pre.encoder, range(a.seeds), TUNED)


if __name__ == '__main__': main()
