"""What the layers of a frozen encoder know together that the last one does not, by five-fold cross-validation inside folds 1-9

    OMP_NUM_THREADS=1 python benchmarks/ptbxl_small/layers.py PTBXL_FOLDER --encoders NAME=FOLDER [NAME=FOLDER …] --work WORK [--pool mean_max] [--out benchmarks/ptbxl_small]

Encoders are folders of `save_encoder`, of `ecg-pma pretrain`, pretrained on folds 1-8 without labels. A ridge regression on frozen features is fitted for each group of folds (1,2 · 3,4 · 5,6 · 7,8 · 9) on the
rest of folds 1-9 and scored on the group. layers.csv in OUT: encoder, pool, what was read, mean over groups and its spread, fold 9, and the paired difference to the last layer with its 95 % interval.
"""
import argparse, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
from pathlib import Path
import numpy as np, pandas as pd
from fastai_ecg_pma.features import labelled, layer_features
from fastai_ecg_pma.metrics import macro_auroc
from fastai_ecg_pma.parts import PARTS
from fastai_ecg_pma.probe import ridge_probe
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.weights import load_encoder
from run import GROUPS, HERE, paired

def read(h):
    "`{what is read: features}` of stacks `[n,1+n_layers,d]`"
    L = h.shape[1]-1
    return {**{f'layer {l}': h[:,l] for l in range(L)}, 'last layer': h[:,L], 'PPA': h[:,1:].mean(1), 'concatenation': h[:,1:].flatten(1), 'concatenation, embeddings too': h.flatten(1)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder'); p.add_argument('--encoders', nargs='+', required=True); p.add_argument('--work', type=Path, required=True)
    p.add_argument('--pool', default='mean_max', choices=list(PARTS['pool'])); p.add_argument('--out', type=Path, default=HERE)
    args, rows = p.parse_args(), []
    dls = ptbxl_dls(args.folder, cache=args.work/'cache')
    for name,folder in (e.split('=', 1) for e in args.encoders):
        feats = layer_features(load_encoder(folder), dls, pool=PARTS['pool'][args.pool])
        (h, y), (g, t) = (labelled(feats, i) for i in (0, 1))
        x, y, fold, patients = np.concatenate([h, g]), np.concatenate([y, t]), feats.table.strat_fold.to_numpy(), feats.table.patient_id.to_numpy()
        inside = [np.isin(fold, group) for group in GROUPS]
        said = {what: [ridge_probe().fit(f[~v], y[~v]).predict(f[v]) for v in inside] for what,f in read(h.new_tensor(x)).items() for f in [f.numpy()]}
        for what,ps in said.items():
            by_group = [macro_auroc(p, y[v]) for p,v in zip(ps, inside)]
            d = (0, 0, 0) if what == 'last layer' else paired([(p[None], q[None], y[v], patients[v]) for p,q,v in zip(ps, said['last layer'], inside)])
            rows.append(dict(encoder=name, pool=args.pool, read=what, cv=np.mean(by_group), spread=np.std(by_group, ddof=1), fold9=by_group[-1], **dict(zip(('difference', 'd_low', 'd_high'), d))))
        print(pd.DataFrame(rows).round(4).to_string(), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(5).to_csv(args.out/'layers.csv', index=False)

if __name__ == '__main__': main()
