"""Recipes on a small PTB-XL, by five-fold cross-validation inside folds 1-9; fold 10 is never read

    OMP_NUM_THREADS=1 python benchmarks/ptbxl_small/run.py PTBXL_FOLDER --work WORK [--out benchmarks/ptbxl_small] [--recipes kernels hybrid …] [--together hybrid+kernels …] [--seeds 0 …] [--shares 1 …] [--groups 0 1 2 3 4] [--task statements]

A recipe is a YAML file beside this script, for `ecg-pma train`, also with changes as in the shell: "hybrid model.readout=Last"; of one whose members answer together, `member0@hybrid` is what that one says. Baselines: `kernels`, 1,500 random convolutions (max and share positive), and `minirocket`, 10,000 features of tsai's, both read by kernel ridge
regression; `inception_time` and `xresnet1d18`, networks of tsai, trained as scratch.yaml says. What a recipe pretrains is pretrained once for each seed, on folds 1-8 without labels. Then for each group of folds
(1,2 · 3,4 · 5,6 · 7,8 · 9) a model is trained on the rest of folds 1-9, or on a share of their labels in as many steps, and scored on the group; the last group is the usual split, trained on folds 1-8 and
scored on fold 9. Labels are the five super-classes; with `--task statements`, all statements with ten positives or more among the training records. Nothing is chosen by the records that are scored: models are those at the end of training.

Runs stay in WORK and are not made again; one that was interrupted goes on. Tables in OUT are added to:
runs.csv     task, recipe, share of the labels, seed, group, macro-AUROC, minutes (of the training; of the pretraining in the row of the first group)
table.csv    task, recipe, or several `--together`, whose scores are averaged over them and over seeds: mean over groups (median over seeds) with its spread over groups, empty unless all are there, fold 9 with its 95 % interval (patients drawn
             again), the protocol's hash, and with its interval the paired difference, mean over groups, to `kernels`; and of a recipe with a change,
             or several, to the same without its last change, or the last ones
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd
from fastai_ecg_pma.intervals import compare, score
from fastai_ecg_pma.metrics import macro_auroc
from recipes import GROUPS, HERE, TASKS, encoder, folder_of, recipe, trained
from baselines import BASELINES, baseline, small_dls

def predicted(args, name, seed, share, g):
    member, _, of = name.rpartition('@')
    t = (baseline if of in BASELINES else trained)(args, of, seed, share, g)
    if member: t = pd.read_csv(folder_of(args, of, seed, share, g)/member/'predictions.csv')
    print(name, f'seed {seed}, share {share:g}, group {g}: {macro_auroc(*pair(t)):.4f}', flush=True)
    return t

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder'); p.add_argument('--work', type=Path, required=True); p.add_argument('--out', type=Path, default=HERE)
    p.add_argument('--recipes', nargs='+', default=['kernels', 'scratch', 'hybrid']); p.add_argument('--together', nargs='+', default=[])
    p.add_argument('--seeds', nargs='+', type=int, default=[0]); p.add_argument('--shares', nargs='+', type=float, default=[1.]); p.add_argument('--groups', nargs='+', type=int, default=list(range(5))); p.add_argument('--task', choices=TASKS, default='classes')
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for share in args.shares:
        said = {(name, seed, g): predicted(args, name, seed, share, g) for name in args.recipes for seed in args.seeds for g in args.groups}
        runs = [dict(task=args.task, recipe=name, share=share, seed=seed, group=g, auroc=macro_auroc(*pair(t)), minutes=minutes(args, name, seed, share, g)) for (name,seed,g),t in said.items()]
        rows = [row(args, names, share, said) for names in [*args.recipes, *args.together]]
        update(args.out/'runs.csv', runs, 'task recipe share seed group'); update(args.out/'table.csv', rows, 'task recipe share')

def update(file, rows, by):
    "Rows take the place of those that are equal in the columns `by`; the others of `file` stay"
    new, by = pd.DataFrame(rows), by.split()
    if file.exists(): new = pd.concat([pd.read_csv(file), new]).drop_duplicates(by, keep='last')
    new.round(5).to_csv(file, index=False); print(new.round(4).to_string(), flush=True)

def pair(t):
    labels = [c[:-5] for c in t if c.endswith('_true')]
    return t[labels].to_numpy(), t[[f'{c}_true' for c in labels]].to_numpy()

def minutes(args, name, seed, share, g):
    "Of the training; with the pretraining, which is done once, in the first group"
    name = name.rpartition('@')[2]
    of = [folder_of(args, name, seed, share, g)]
    if g == args.groups[0] and name not in BASELINES and (c := recipe(name)).values['pretraining']: of.append(encoder(args, c, seed))
    return sum(float((f/'minutes').read_text()) for f in of)

def scores(args, names, said):
    "For each group of folds what a recipe says, `[n_seeds,n_records,n_classes]`, or the mean of what several say from all seeds, `[1,n_records,n_classes]`"
    each = lambda g: np.stack([pair(said[name,seed,g])[0] for name in names.split('+') for seed in args.seeds])
    return [each(g).mean(0, keepdims=True) if '+' in names else each(g) for g in args.groups]

def row(args, names, share, said):
    "Groups are weighted alike; all seeds are drawn again together"
    about = [said[args.recipes[0],args.seeds[0],g] for g in args.groups]
    ys, patients, ps = [pair(t)[1] for t in about], [t.patient_id.to_numpy() for t in about], scores(args, names, said)
    by_group = [np.median([macro_auroc(p, y) for p in group]) for group,y in zip(ps, ys)]
    out, whole = dict(task=args.task, recipe=names, share=share, seeds=len(args.seeds)), len(args.groups) == len(GROUPS)
    if whole: out |= dict(cv=np.mean(by_group), spread=np.std(by_group, ddof=1))
    if (last := len(GROUPS)-1) in args.groups:
        i = args.groups.index(last); s = score(ps[i], ys[i], patients[i])
        out |= dict(fold9=s.point, fold9_low=s.low, fold9_high=s.high, protocol=small_dls(args, 0, share, last).protocol.on('valid').hash)
    for other,to in (('kernels', 'difference d_low d_high'), ('+'.join(unchanged(n, args.recipes) for n in names.split('+')), 'change c_low c_high')):
        if not whole or other == names or not {*other.split('+')} <= {*args.recipes}: continue
        out |= dict(zip(to.split(), paired(list(zip(ps, scores(args, other, said), ys, patients)))))
    return out

def unchanged(name, recipes):
    "The recipe without its last change, or without as many as it takes to come to one of `recipes`"
    while ' ' in name and (name := name.rpartition(' ')[0]) not in recipes: pass
    return name

def paired(groups):
    "Mean over groups of the difference in macro-AUROC, with its 95 % interval; a group is `(scores, others, targets, patients)`. Groups hold other patients: their errors are independent"
    d = [compare(*g) for g in groups]
    mean, half = np.mean([v.point for v in d]), np.sqrt(sum(((v.high-v.low)/2)**2 for v in d))/len(d)
    return mean, mean-half, mean+half

if __name__ == '__main__': main()
