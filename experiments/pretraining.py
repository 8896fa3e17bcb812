"""STMEM or IPASTMEM: which pretraining leaves more in the layers?

    OMP_NUM_THREADS=1 python experiments/pretraining.py PTBXL_FOLDER --work WORK [--out experiments/pretraining] [--epochs 40] [--seeds 0 1 2] [--tasks STMEM IPASTMEM]

Each task and seed: a `tiny` ViT pretrained on folds 1-8 without labels, the same first weights, order of records and masks for both tasks; every few epochs its frozen layers are probed
(ridge regression, super-classes, fitted on folds 1-8, scored on fold 9). A run's predictions go to WORK as they come; a run that is there is not made again. From all of them the tables in OUT:

runs.csv      task, seed, epochs, what was read (layer 0 … L, PPA: the mean of layers 1 … L, concat: all of them side by side), macro-AUROC
summary.csv   epochs, what was read, mean over seeds of each task, and the difference of IPASTMEM to STMEM with its 95 % interval: patients are drawn again, the same ones for all runs
losses.csv    task, seed, epoch, loss in training and validation
"""
import argparse, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
from pathlib import Path
import numpy as np, pandas as pd
from fastai.torch_core import no_random
from fastai_ecg_pma.aggregate import PPA, Last
from fastai_ecg_pma.intervals import patient_counts
from fastai_ecg_pma.learner import pretrain_learner, split_patients
from fastai_ecg_pma.metrics import class_aurocs
from fastai_ecg_pma.monitor import ProbeLayers
from fastai_ecg_pma.features import labelled, layer_features
from fastai_ecg_pma.probe import ridge_probe
from fastai_ecg_pma.ptbxl import ptbxl_dls

TASKS = dict(STMEM=Last, IPASTMEM=PPA)

class KeepPredictions(ProbeLayers):
    "Beside the scores, what the probe of each layer, of their mean and of all of them says of each validation record"
    def look(self, epochs):
        with no_random(): feats = layer_features(self.model.encoder, self.dls_probe)
        (H,y),(G,t) = (labelled(feats, i) for i in (0,1))
        read = {**{str(l): (H[:,l], G[:,l]) for l in range(H.shape[1])}, 'PPA': (H[:,1:].mean(1), G[:,1:].mean(1)), 'concat': (H[:,1:].flatten(1), G[:,1:].flatten(1))}
        self.kept = getattr(self, 'kept', {}) | {f'{epochs}/{k}': ridge_probe().fit(a, y).predict(b).astype(np.float32) for k,(a,b) in read.items()}
        self.rows = [dict(epochs=epochs, layer=l, point=macro(self.kept[f'{epochs}/{l}'], t)) for l in range(H.shape[1])]
        print(f'   after {epochs:3d} epochs: ' + ' '.join(f'{r["point"]:.3f}' for r in self.rows), flush=True)

def macro(scores, targs, counts=None): return np.nanmean(class_aurocs(scores, targs, counts), 1) if counts is not None else float(np.nanmean(class_aurocs(scores, targs)))

def run(folder, labelled, task, seed, args):
    "Pretrain once; its predictions and losses in a file"
    dls, probe = ptbxl_dls(folder, task=None, bs=args.bs), KeepPredictions(labelled, every=args.every)
    learn = pretrain_learner(dls, fuse=TASKS[task], size=args.size, seed=seed, cbs=probe)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 1e-3, pct_start=.1)
    np.savez(file(args, task, seed), losses=np.array([v[:2] for v in learn.recorder.values]), **probe.kept)

def file(args, task, seed): return args.work/f'{task}_{args.size}_{args.epochs}_{seed}.npz'

def tables(labelled, args):
    "The three tables, from the runs that are there"
    t, counts = labelled(labelled, 1)[1], patient_counts(split_patients(labelled), args.resamples)
    runs = {(task,s): np.load(f) for task in TASKS for s in args.seeds if (f := file(args, task, s)).exists()}
    rows = [(task, s, *k.split('/'), macro(r[k], t)) for (task,s),r in runs.items() for k in r if '/' in k]
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=['task','seed','epochs','read','auroc']).astype({'epochs': int})
    table.round(5).to_csv(args.out/'runs.csv', index=False)
    pd.DataFrame([(task, s, e+1, *l) for (task,s),r in runs.items() for e,l in enumerate(r['losses'])], columns=['task','seed','epoch','train','valid']).round(5).to_csv(args.out/'losses.csv', index=False)
    both = [s for s in args.seeds if all((task,s) in runs for task in TASKS)]
    out = []
    for (e,k),_ in table.groupby(['epochs','read'], sort=False):
        point = {task: [macro(runs[task,s][f'{e}/{k}'], t) for s in both] for task in TASKS}
        drawn = {task: np.mean([macro(runs[task,s][f'{e}/{k}'], t, counts) for s in both], 0) for task in TASKS}
        d = drawn['IPASTMEM'] - drawn['STMEM']
        out.append(dict(epochs=e, read=k, seeds=len(both), **{f'{task}{end}': f(v) for task in TASKS for end,f,v in (('', np.mean, point[task]), ('_low', low, drawn[task]), ('_high', high, drawn[task]))},
                        difference=np.mean(point['IPASTMEM']) - np.mean(point['STMEM']), low=low(d), high=high(d), seeds_apart=np.std(np.subtract(point['IPASTMEM'], point['STMEM']), ddof=1) if len(both) > 1 else np.nan))
    pd.DataFrame(out).round(5).to_csv(args.out/'summary.csv', index=False)

def low(v): return np.quantile(v, .025)
def high(v): return np.quantile(v, .975)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--work', type=Path, required=True)
    p.add_argument('--out', type=Path, default=Path('experiments/pretraining'))
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--every', type=int, default=10)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--tasks', nargs='+', default=list(TASKS), choices=TASKS)
    p.add_argument('--size', default='tiny')
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--resamples', type=int, default=1000)
    p.add_argument('--only-tables', action='store_true', help='make no run')
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    labelled = ptbxl_dls(args.folder, 'superdiagnostic', bs=64)
    for seed in [] if args.only_tables else args.seeds:
        for task in args.tasks:
            if file(args, task, seed).exists(): continue
            print(f'{task}, seed {seed}', flush=True)
            run(args.folder, labelled, task, seed, args)
    tables(labelled, args)
