"""Recipes on a small PTB-XL, by five-fold cross-validation inside folds 1-9; fold 10 is never read

    OMP_NUM_THREADS=1 python benchmarks/ptbxl_small/run.py PTBXL_FOLDER --work WORK [--out benchmarks/ptbxl_small] [--recipes kernels scratch hybrid] [--seeds 0] [--groups 0 1 2 3 4]

A recipe is a YAML file beside this script, for `ecg-pma train`; `kernels` is the baseline of 1,500 random convolutions (max and share positive, kernel ridge regression). What a recipe pretrains is pretrained
once for each seed, on folds 1-8 without labels. Then for each group of folds (1,2 · 3,4 · 5,6 · 7,8 · 9) a model is trained on the rest of folds 1-9 and scored on the group; the last group is
the usual split, trained on folds 1-8 and scored on fold 9. Nothing is chosen by the records that are scored: models are those at the end of training.

Runs stay in WORK and are not made again; one that was interrupted goes on. Tables go to OUT:
runs.csv     recipe, seed, group, macro-AUROC, minutes (of the training; of the pretraining in the row of the first group)
table.csv    recipe: mean over groups (median over seeds) with spread over groups, fold 9 with its 95 % interval, and the paired difference to `kernels` with its interval (patients drawn again)
"""
import argparse, os, time, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch.nn.functional import conv1d
from fastai_ecg_pma.config import Config, read_config
from fastai_ecg_pma.intervals import compare, score
from fastai_ecg_pma.metrics import macro_auroc
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.trainings import pretrain, train
from fastai_ecg_pma.weights import load_encoder

HERE, GROUPS = Path(__file__).parent, [(1,2), (3,4), (5,6), (7,8), (9,)]

def rest(group): return [f for f in range(1, 10) if f not in group]

# -- recipes of the library

def trained(args, name, seed, g):
    "Predictions of a recipe for the records of a group"
    out, recipe = args.work/name/str(seed), read_config(HERE/f'{name}.yaml')
    if (first := recipe.pop('pretraining', None)) and not (out/'encoder').exists():
        model = {k: recipe['model'][k] for k in ('arch', 'arch_config', 'size') if k in recipe['model']}
        data = dict(folder=args.folder, cache=str(args.work/'cache'), batch_tfms=first.get('batch_tfms', []), train_folds=list(range(1, 9)))
        c = Config(pretrain, 'values').update(dict(data=data, model={**model, **first['model']}, fit=first['fit'], seed=seed, out=str(out/'encoder_run')))
        timed(out/'encoder_run', lambda: c.call(values=c.values))
        (out/'encoder_run'/'encoder').rename(out/'encoder')
    if first: recipe['model'].update(arch=str(out/'encoder'), arch_config=None)
    recipe['data'] = dict(recipe.get('data', {}), folder=args.folder, cache=str(args.work/'cache'), train_folds=rest(GROUPS[g]), valid_folds=list(GROUPS[g]))
    c = Config(train, 'values').update(dict(recipe, seed=seed, out=str(out/f'group{g}')))
    if not (out/f'group{g}'/'predictions.csv').exists(): timed(out/f'group{g}', lambda: c.call(values=c.values))
    return pd.read_csv(out/f'group{g}'/'predictions.csv')

def timed(folder, f):
    t = time.time(); f()
    (folder/'minutes').write_text(f'{(time.time()-t)/60:.1f}')

# -- the baseline

def kernels(args, name, seed, g):
    "The same of kernel ridge regression on random convolutions"
    file = args.work/name/str(seed)/f'group{g}'/'predictions.csv'
    if not file.exists():
        t, dls = time.time(), ptbxl_dls(args.folder, cache=args.work/'cache', train_folds=rest(GROUPS[g]), valid_folds=GROUPS[g])
        (a, y), (b, truth) = ((convolved(torch.stack([r[0].as_subclass(torch.Tensor) for r in d]), seed), np.stack([np.asarray(r[1]) for r in d])) for d in (dls.train.dataset, dls.valid.dataset))
        table, p = dls.table.iloc[np.asarray(dls.valid.dataset.split_idxs)], kernel_ridge(a, y, b)
        file.parent.mkdir(parents=True)
        pd.DataFrame({'record': table.filename_lr.to_numpy(), 'patient_id': table.patient_id.to_numpy(), **{v: p[:,i] for i,v in enumerate(dls.vocab)}, **{f'{v}_true': truth[:,i].astype(int) for i,v in enumerate(dls.vocab)}}).to_csv(file, index=False)
        (file.parent/'minutes').write_text(f'{(time.time()-t)/60:.1f}')
    return pd.read_csv(file)

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
            best = max(best, (macro_auroc(left_out, y), width, tuple(map(tuple, c))), key=lambda t: t[0])
    return np.exp(-best[1]*square(b, a)/np.median(d))@np.array(best[2]) + m

# -- tables

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder'); p.add_argument('--work', type=Path, required=True); p.add_argument('--out', type=Path, default=HERE)
    p.add_argument('--recipes', nargs='+', default=['kernels', 'scratch', 'hybrid']); p.add_argument('--seeds', nargs='+', type=int, default=[0]); p.add_argument('--groups', nargs='+', type=int, default=list(range(5)))
    args = p.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    runs, said = [], {}
    for name in args.recipes:
        for seed in args.seeds:
            for g in args.groups:
                t = said[name,seed,g] = (kernels if name == 'kernels' else trained)(args, name, seed, g)
                runs.append(dict(recipe=name, seed=seed, group=g, auroc=macro_auroc(*pair(t)), minutes=minutes(args, name, seed, g)))
                print(runs[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(runs); runs.round(5).to_csv(args.out/'runs.csv', index=False)
    t = pd.DataFrame([row(args, name, runs[runs.recipe == name], said) for name in args.recipes])
    t.round(4).to_csv(args.out/'table.csv', index=False); print(t.round(3).to_string())

def paired(groups):
    "Mean over groups of the difference in macro-AUROC, with its 95 % interval; a group is `(scores, others, targets, patients)`. Groups hold other patients: their errors are independent"
    d = [compare(*g) for g in groups]
    mean, half = np.mean([v.point for v in d]), np.sqrt(sum(((v.high-v.low)/2)**2 for v in d))/len(d)
    return mean, mean-half, mean+half

def pair(t):
    labels = [c[:-5] for c in t if c.endswith('_true')]
    return t[labels].to_numpy(), t[[f'{c}_true' for c in labels]].to_numpy()

def minutes(args, name, seed, g):
    read = lambda f: float(f.read_text()) if f.exists() else 0
    return read(args.work/name/str(seed)/f'group{g}'/'minutes') + (read(args.work/name/str(seed)/'encoder_run'/'minutes') if g == args.groups[0] else 0)

def row(args, name, runs, said):
    "Groups are weighted alike; all seeds of a recipe are drawn again together"
    by_group = runs.groupby('group').auroc.median()
    out = dict(recipe=name, seeds=runs.seed.nunique(), cv=by_group.mean(), spread=by_group.std(), minutes=runs.minutes.sum()/runs.seed.nunique())
    if (g := len(GROUPS)-1) in args.groups:
        ps = np.stack([pair(said[name,s,g])[0] for s in args.seeds]); t = said[name,args.seeds[0],g]; s = score(ps, pair(t)[1], t.patient_id.to_numpy())
        out |= dict(fold9=s.point, fold9_low=s.low, fold9_high=s.high)
    if 'kernels' in args.recipes and name != 'kernels':
        scores = lambda n,g: np.stack([pair(said[n,s,g])[0] for s in args.seeds])
        d = paired([(scores(name, g), scores('kernels', g), pair(said[name,args.seeds[0],g])[1], said[name,args.seeds[0],g].patient_id.to_numpy()) for g in args.groups])
        out |= dict(zip(('difference', 'd_low', 'd_high'), d))
    return out

if __name__ == '__main__': main()
