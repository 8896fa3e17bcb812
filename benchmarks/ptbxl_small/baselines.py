"""What the recipes have to beat: random convolutions and MiniRocket, read by kernel ridge regression, and networks of tsai"""
import numpy as np, pandas as pd, torch
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.torch_core import set_seed
from torch.nn.functional import conv1d
from tsai.models.InceptionTimePlus import InceptionTimePlus
from tsai.models.MINIROCKET_Pytorch import MiniRocketFeatures, get_minirocket_features
from tsai.models.XResNet1dPlus import xresnet1d18plus
from fastai_ecg_pma.features import labelled
from fastai_ecg_pma.learner import row_scores
from fastai_ecg_pma.metrics import macro_auroc
from fastai_ecg_pma.parts import PARTS, part
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.scale import Autocast
from fastai_ecg_pma.trainings import predictions
from fastai_ecg_pma.tune import EMA
from recipes import epochs, folder_of, recipe, records, timed

def small_dls(args, seed, share, g, **kwargs): return ptbxl_dls(args.folder, cache=args.work/'cache', **records(args, g, share, seed), **kwargs)

def baseline(args, name, seed, share, g):
    "Predictions for the records of a group"
    out = folder_of(args, name, seed, share, g)
    def fit():
        said, dls = (closed_form if name in CLOSED else network)(args, name, seed, share, g)
        predictions(said, dls).to_csv(out/'predictions.csv', index=False)
    if not (out/'predictions.csv').exists(): timed(out, fit)
    return pd.read_csv(out/'predictions.csv')

# -- networks of tsai

def network(args, name, seed, share, g):
    "From random weights, as scratch.yaml says"
    c = recipe('scratch').values
    fit = c['fit']
    set_seed(seed, reproducible=True)
    dls = small_dls(args, seed, share, g, batch_tfms=[part(t, PARTS['batch_tfms'])() for t in c['data']['batch_tfms']])
    learn = Learner(dls, NETWORKS[name](dls.train.dataset[0][0].shape[0], len(dls.vocab), dls.train.dataset[0][0].shape[1]), loss_func=BCEWithLogitsLossFlat(), wd=.05, cbs=[Autocast(torch.bfloat16), EMA(fit['ema']), GradientClip(fit['clip'])])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs(fit['epochs'], share), fit['lr'], pct_start=fit['warmup'])
    return row_scores(learn), dls

NETWORKS = dict(inception_time=InceptionTimePlus, xresnet1d18=xresnet1d18plus)

# -- closed form

def closed_form(args, name, seed, share, g):
    dls = small_dls(args, seed, share, g)
    (a, y), (b, truth) = (labelled(dls, i) for i in (0, 1))
    a, b = CLOSED[name](args, seed, dls, a, b)
    return (kernel_ridge(a.astype(float), y.astype(float), b.astype(float)), truth), dls

def kernels(args, seed, dls, a, b):
    "Features of random convolutions of the records of both splits. They are of a record alone, so those of all are kept in WORK"
    file, path = args.work/f'kernels_{seed}.npz', np.array([p.as_posix() for p in dls.paths])
    if not file.exists():
        every = ptbxl_dls(args.folder, 'all', cache=args.work/'cache')
        at = np.concatenate([np.asarray(every[i].dataset.split_idxs) for i in (0, 1)])
        np.savez(file, records=[every.paths[i].as_posix() for i in at], features=convolved(torch.cat([labelled(every, i)[0] for i in (0, 1)]), seed))
    kept = np.load(file)
    of = dict(zip(kept['records'], kept['features']))
    return (np.stack([of[path[i]] for i in d.split_idxs]) for d in (dls.train.dataset, dls.valid.dataset))

def convolved(x, seed, n=1500):
    "`[n_records,n_leads,seq_len]` -> maximum and share positive of `n` random convolutions of some leads, `[n_records,2*n]`"
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        k, n_leads = int(rng.choice([7, 9, 11])), int(2**rng.uniform(0, np.log2(x.shape[1]+1)))
        dilation, leads = int(2**rng.uniform(0, np.log2(40))), rng.choice(x.shape[1], n_leads, replace=False)
        w = torch.from_numpy(rng.normal(size=(1, n_leads, k)).astype(np.float32))
        y = conv1d(x[:,leads], w - w.mean(-1, keepdim=True), dilation=dilation, padding=(k-1)*dilation//2)[:,0] + rng.uniform(-1, 1)
        out += [y.amax(1), (y > 0).float().mean(1)]
    return torch.stack(out, 1).numpy().astype(np.float64)

def kernel_ridge(a, y, b, widths=(.25, .5, 1, 2), penalties=np.logspace(-3, 2, 11)):
    "Scores of `b`, by a Gaussian kernel; width and penalty by the macro-AUROC of leaving one training record out"
    mean, sd, m = a.mean(0), a.std(0) + 1e-9, y.mean(0)
    a, b = (a-mean)/sd, (b-mean)/sd
    square = lambda p,q: np.maximum((p**2).sum(1)[:,None] + (q**2).sum(1) - 2*p@q.T, 0)
    d, best = square(a, a), (-1,)
    for width in widths:
        w,q = np.linalg.eigh(np.exp(-width*d/np.median(d)))
        for penalty in penalties:
            c = q@((q.T@(y-m))/(w+penalty)[:,None])
            left_out = y - c/((q**2)/(w+penalty)).sum(1)[:,None]
            best = max(best, (macro_auroc(left_out, y), width, c), key=lambda t: t[0])
    return np.exp(-best[1]*square(b, a)/np.median(d))@best[2] + m

def minirocket(args, seed, dls, a, b):
    "Features of `a`, to whose quantiles they are fitted, and of `b`"
    f = MiniRocketFeatures(a.shape[1], a.shape[2], random_state=seed)
    f.fit(a.numpy(), chunksize=256)
    return (get_minirocket_features(x, f, chunksize=64)[...,0] for x in (a, b))

CLOSED = dict(kernels=kernels, minirocket=minirocket)
BASELINES = (*CLOSED, *NETWORKS)
