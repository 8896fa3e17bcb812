"""What the layers of a frozen encoder know together that the last one does not, by length of pretraining and five-fold cross-validation inside folds 1-9

    OMP_NUM_THREADS=1 python benchmarks/ptbxl_small/layers.py PTBXL_FOLDER --work WORK [--recipe hybrid] [--epochs 20 60 200 600] [--seeds 0 …] [--pool mean_max] [--readers ridge kernel_ridge] [--out benchmarks/ptbxl_small]

The encoder of a recipe is pretrained on folds 1-8 without labels, for each number of epochs and each seed. Ridge regression, and kernel ridge regression (Gaussian, width and penalty by leaving one training record
out), on frozen features are fitted for each group of folds (1,2 · 3,4 · 5,6 · 7,8 · 9) on the rest of folds 1-9 and scored on the group.

layers.csv   added to: recipe, epochs, seed, pool, reader, what was read, mean over groups and its spread, fold 9, and the paired difference to the last layer of the same encoder with its 95 % interval
"""
import argparse
from pathlib import Path
import numpy as np
from fastai_ecg_pma.features import labelled, layer_features
from fastai_ecg_pma.metrics import macro_auroc
from fastai_ecg_pma.parts import PARTS
from fastai_ecg_pma.probe import ridge_probe
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.weights import load_encoder
from baselines import kernel_ridge
from recipes import GROUPS, HERE, encoder, recipe
from run import paired, update

READERS = dict(ridge=lambda a, y, b: ridge_probe().fit(a, y).predict(b), kernel_ridge=kernel_ridge)

def read(h):
    "`{what is read: features}` of stacks `[n,1+n_layers,d]`"
    L = h.shape[1]-1
    return {**{f'layer {l}': h[:,l] for l in range(L)}, 'last layer': h[:,L], 'PPA': h[:,1:].mean(1), 'concatenation': h[:,1:].reshape(len(h), -1), 'concatenation, embeddings too': h.reshape(len(h), -1)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder'); p.add_argument('--work', type=Path, required=True); p.add_argument('--recipe', default='hybrid')
    p.add_argument('--epochs', nargs='+', type=int, default=[20, 60, 200, 600]); p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--pool', default='mean_max', choices=list(PARTS['pool'])); p.add_argument('--readers', nargs='+', default=list(READERS), choices=list(READERS)); p.add_argument('--out', type=Path, default=HERE)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dls = ptbxl_dls(args.folder, cache=args.work/'cache')
    for epochs in args.epochs:
        for seed in args.seeds: update(args.out/'layers.csv', rows(args, dls, epochs, seed), 'recipe epochs seed pool reader read')

def rows(args, dls, epochs, seed):
    feats = layer_features(load_encoder(encoder(args, recipe(args.recipe), seed, epochs)/'encoder'), dls, pool=PARTS['pool'][args.pool])
    (a, y), (b, t) = (labelled(feats, i) for i in (0, 1))
    h, y, fold, patients = np.concatenate([a, b]).astype(float), np.concatenate([y, t]).astype(float), feats.table.strat_fold.to_numpy(), feats.table.patient_id.to_numpy()
    inside = [np.isin(fold, group) for group in GROUPS]
    said = {(r, what): [READERS[r](f[~v], y[~v], f[v]) for v in inside] for r in args.readers for what,f in read(h).items()}
    for (r,what),ps in said.items():
        by_group = [macro_auroc(p, y[v]) for p,v in zip(ps, inside)]
        d = (0, 0, 0) if what == 'last layer' else paired([(p[None], q[None], y[v], patients[v]) for p,q,v in zip(ps, said[r,'last layer'], inside)])
        yield dict(recipe=args.recipe, epochs=epochs, seed=seed, pool=args.pool, reader=r, read=what, cv=np.mean(by_group), spread=np.std(by_group, ddof=1), fold9=by_group[-1], **dict(zip(('difference', 'd_low', 'd_high'), d)))

if __name__ == '__main__': main()
