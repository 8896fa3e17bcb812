"""Is the last layer the best one to read from? The paper's question on PTB-XL records, from pretraining to transfer

    OMP_NUM_THREADS=1 python experiments/paper.py PTBXL_FOLDER --ludb LUDB_FOLDER --cinc2017 CINC2017_FOLDER --work WORK [--out experiments/paper] [--stages encoders layers leads readouts few gates ludb cinc2017]

Encoders: a `tiny` ViT pretrained on folds 1-8 without labels as STMEM and as IPASTMEM, three seeds each, and three random ones of the same shape. They stay frozen. Five super-classes, scored by macro-AUROC on fold 9.

layers     a probe of each layer, of their mean (PPA) and of all side by side (concat), fitted on folds 1-8 and scored on fold 9: ridge regression at 1, 10 and 100 % of the labels, the paper's MLP at 100 %
readouts   each read-out with the paper's head trained on folds 1-7 from five seeds; the epoch is chosen on fold 8, fold 9 is scored
leads      the ridge probe with one mean a lead instead of one of the record, beside the plain one
few        as readouts, with 10 % of the labels of folds 1-7, other records for each seed
gates      of the read-outs with a gate: do weights move between records, what would mean weights cost, weights by class, what each layer is worth
ludb       the heads trained on PTB-XL, as they are, on 60 records of another country and device; band-passed 0.5-40 Hz as this PTB-XL subset was
cinc2017   one-lead records of a wrist-held device, read as lead I: ridge regression on four classes, every fifth record is scored

All that is made stays in WORK (encoders, features, runs) and is not made again. Means are over seeds; intervals (95 %) draw patients again, the same ones for all runs. Tables go to OUT.
"""
import argparse, json, platform, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
import numpy as np, pandas as pd
from fastai_ecg_pma.aggregate import PPA, Concat, Last, Static
from fastai_ecg_pma.attend import Attentive
from fastai_ecg_pma.challenges import cinc2017_dls, ludb_labels, ludb_table
from fastai_ecg_pma.checkpoint import Checkpoint
from fastai_ecg_pma.compare import PMA_DEFAULT, compare_readouts, last_four, probabilities, random_like
from fastai_ecg_pma.data import ecg_dls, wfdb_dls
from fastai_ecg_pma.features import labelled, layer_features
from fastai_ecg_pma.gate import PMA
from fastai_ecg_pma.gates import drop_layers, gate_by_class, gate_report
from fastai_ecg_pma.intervals import compare, holm, score
from fastai_ecg_pma.layers import mean_leads
from fastai_ecg_pma.learner import by_record, pretrain_learner
from fastai_ecg_pma.metrics import auroc
from fastai_ecg_pma.probe import mlp_probe, ridge_probe
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.splits import label_subsets
from fastai_ecg_pma.weights import load_encoder, save_encoder

TASKS = dict(STMEM=Last, IPASTMEM=PPA)
FEW = {'last layer':Last, 'PPA':PPA, 'static':Static, 'PMA':PMA, 'PMA, default':PMA_DEFAULT, 'concatenation':Concat, 'attentive':Attentive}
ALL = {**FEW, 'last four':last_four}                # and the best single layer, by a ridge probe on the records that choose
HEADS = range(5)
BAND = dict(highpass=.5, lowpass=40)             # Hz: the PTB-XL subset comes filtered so, other records have to be

# -- encoders

def pretrain(args, task, seed):
    "The folder of an encoder in WORK"
    folder = args.work/f'{task}_{args.size}_{args.epochs}_{seed}'
    if (folder/'config.json').exists(): return folder
    print(folder.name, flush=True)
    learn = pretrain_learner(ptbxl_dls(args.folder, task=None, bs=args.bs), fuse=TASKS[task], size=args.size, seed=seed, cbs=Checkpoint(args.work/f'{folder.name}.checkpoints', keep=1))
    with learn.no_bar(): learn.fit_one_cycle(args.epochs, 1e-3, pct_start=.1)
    return save_encoder(learn.encoder, folder)

def encoders(args):
    "`{(task, seed): encoder}`, those of `random` among them"
    out = {(task,s): load_encoder(f) for s in args.seeds for task in TASKS if (f := args.work/f'{task}_{args.size}_{args.epochs}_{s}').exists() and (f/'config.json').exists()}
    return {**out, **{('random',s): random_like(next(iter(out.values())), 100+s) for s in args.seeds}}

def banded(enc):
    "A copy that expects records which were filtered by us"
    enc = deepcopy(enc)
    enc.prep = replace(enc.prep, **BAND)
    return enc

# -- tables


def summary(kept, targs, patients, reference, by=('task',), **kwargs):
    "`kept` `{(task, read, …, seed): scores}` -> a row a task and read: mean over runs with interval, and the paired difference to `reference` of the same task"
    groups, out = {}, []
    for k,p in kept.items(): groups.setdefault(k[:-1], []).append(p)
    for key,ps in groups.items():
        ref = groups[key[0], reference, *key[2:]]
        s, d = (f(*a, targs, patients, **kwargs) for f,a in ((score, [np.stack(ps)]), (compare, [np.stack(ps), np.stack(ref)])))
        out.append([*key, len(ps), s.point, s.low, s.high, *([0, 0, 0, np.nan] if key[1] == reference else [d.point, d.low, d.high, d.p])])
    t = pd.DataFrame(out, columns=['task', 'read', *(['share'] if len(key) > 2 else []), 'runs', 'auroc', 'low', 'high', 'difference', 'd_low', 'd_high', 'p'])
    return t.assign(p_holm=t.groupby([c for c in ('task','share') if c in t]).p.transform(holm))

def write(args, name, table):
    args.out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(args.out/f'{name}.csv', index=False)
    print(f'-- {name}\n{table.round(3).to_string()}', flush=True)

# -- stages

def read_layers(H, G):
    "`{what is read: (training, scored)}`"
    return {**{str(l): (H[:,l], G[:,l]) for l in range(H.shape[1])}, 'PPA': (H[:,1:].mean(1), G[:,1:].mean(1)), 'concat': (H[:,1:].reshape(len(H), -1), G[:,1:].reshape(len(G), -1))}

def fitted(args, feats, what, make, few=None):
    "Scores of the validation rows by what is read, kept in WORK"
    file = args.work/'probes'/f'{feats.key}_{what}.npz'
    if not file.exists():
        (H,y),(G,_) = (labelled(feats, i) for i in (0,1))
        few = np.ones(len(y), bool) if few is None else few
        file.parent.mkdir(exist_ok=True)
        np.savez(file, **{k: make().fit(a[few].numpy(), y[few]).predict(b.numpy()).astype(np.float32) for k,(a,b) in read_layers(H, G).items()})
    return dict(np.load(file))

def layers(args, dls, encs):
    kept, mlp = {}, {}
    for (task,s),enc in encs.items():
        feats = layer_features(enc, dls, cache=args.work/'cache')
        y, t, patients = labelled(feats, 0)[1], *by_record(None, labelled(feats, 1)[1], feats)[1:]
        of = feats.table.patient_id.to_numpy()[:len(y)]
        for share in (1, .1, .01):
            for h in HEADS if share < 1 else [0]:
                few = None if share == 1 else label_subsets(y, of, [share], h)[share]
                for k,p in fitted(args, feats, f'ridge_{share}_{h}', ridge_probe, few).items(): kept[task,k,share,f'{s}/{h}'] = p
        if task != 'random' or s == args.seeds[0]:
            for h in HEADS:
                for k,p in fitted(args, feats, f'mlp_{h}', partial(mlp_probe, h, epochs=30)).items(): mlp[task,k,f'{s}/{h}'] = p
        print('layers', task, s, flush=True)
    write(args, 'layers_ridge', summary(kept, t, patients, '8'))
    write(args, 'layers_mlp', summary(mlp, t, patients, '8'))

def leads(args, dls, encs):
    kept, names = {}, {'8': 'last layer', 'PPA': 'PPA', 'concat': 'concat'}
    for (task,s),enc in encs.items():
        for how,pool in (('', {}), (', leads apart', dict(pool=mean_leads))):
            feats = layer_features(enc, dls, cache=args.work/'cache', **pool)
            ps = fitted(args, feats, 'ridge_1_0', ridge_probe)
            for k,name in names.items(): kept[task, name+how, f'{s}/0'] = ps[k]
        print('leads', task, s, flush=True)
    write(args, 'leads', summary(kept, *by_record(None, labelled(feats, 1)[1], feats)[1:], 'last layer'))

def compared(args, enc, dls, test, readouts, seeds=HEADS):
    return compare_readouts(enc, dls, readouts, epochs=args.head_epochs, seeds=seeds, test=test, cache=args.work/'cache', n=0, random=False, best_layer=readouts is ALL)

def readouts(args, dls, choose, encs):
    kept, runs, t, patients = {}, [], None, None
    for (task,s),enc in encs.items():
        c = compared(args, enc, choose, dls, ALL if task != 'random' else {'last layer':Last, 'PPA':PPA, 'concatenation':Concat})
        t, patients = c.targs, c.patients
        runs.append(c.runs.assign(task=task, encoder=s))
        for name,ps in c.scores.items():
            for h,p in zip(HEADS, ps): kept[task, name.split(' (')[0], f'{s}/{h}'] = p
        print('read-outs', task, s, flush=True)
    write(args, 'readouts_runs', pd.concat(runs))
    write(args, 'readouts', summary(kept, t, patients, 'last layer'))

def few(args, dls, encs, share=.1):
    kept = {}
    for h in HEADS:
        small = ptbxl_dls(args.folder, 'superdiagnostic', bs=64, train_folds=range(1,8), valid_folds=[8], share=share, seed=h, cache=args.work/'records')
        for (task,s),enc in encs.items():
            if task == 'random': continue
            c = compared(args, enc, small, dls, FEW, [h])
            for name,ps in c.scores.items(): kept[task, name, f'{s}/{h}'] = ps[0]
        print('few', h, flush=True)
    write(args, 'few', summary(kept, c.targs, c.patients, 'last layer'))

def gates(args, dls, choose, encs):
    report, by_class, drops = [], [], []
    for (task,s),enc in encs.items():
        if task == 'random': continue
        c, on = compared(args, enc, choose, dls, ALL), layer_features(enc, dls, cache=args.work/'cache')
        for name in ('PMA', 'PMA, default', 'static'):
            for h,learn in enumerate(c.learners[name]):
                learn.dls = on
                with warnings.catch_warnings(): warnings.simplefilter('ignore'); report.append(dict(task=task, encoder=s, head=h, read=name, **gate_report(learn, n=0 if h else 1000)))
                if not h: by_class.append(gate_by_class(learn).assign(task=task, encoder=s, read=name)); drops.append(drop_layers(learn).assign(task=task, encoder=s, read=name))
        print('gates', task, s, flush=True)
    write(args, 'gate_report', pd.DataFrame(report)); write(args, 'gate_by_class', pd.concat(by_class)); write(args, 'drop_layers', pd.concat(drops))

def of_known(known):
    "AUROC of each class on the records whose label is known"
    def metric(s, t, counts=None): return np.stack([auroc(s[k,i], t[k,i], None if counts is None else counts[:,k]) for i,k in enumerate(known.T)], 1)
    metric.__name__ = 'class_aurocs of known labels'
    return metric

def ludb(args, choose, encs):
    table, kept = ludb_table(args.ludb), {}
    y, known = ludb_labels(table, list(choose.vocab))
    at = table.assign(valid=np.arange(len(table)) > 0, **dict(zip(choose.vocab, y.T)))               # the first is for training, of which nothing is made: tsai's dls need one
    for (task,s),enc in encs.items():
        if task == 'random': continue
        c = compared(args, enc, choose, args.scored, ALL)
        there = wfdb_dls(args.ludb, at, 'path', list(choose.vocab), 'valid', banded(enc).prep)
        feats = layer_features(banded(enc), there, cache=args.work/'cache')
        for name in c.learners:
            for h,learn in enumerate(c.learners[name]): kept[task, name.split(' (')[0], f'{s}/{h}'] = probabilities(learn, feats)
    write(args, 'ludb', summary(kept, y[1:], None, 'last layer', metric=of_known(known[1:])))
    each = {task: np.mean([of_known(known[1:])(p, y[1:])[0] for k,p in kept.items() if k[:2] == (task, 'last layer')], 0) for task in TASKS}
    write(args, 'ludb_classes', pd.DataFrame(dict(label=list(choose.vocab), positive=(y[1:]*known[1:]).sum(0), known=known[1:].sum(0), **each)))

def one_lead(args):
    "`dls` of the middle ten seconds or so of each record, its lead called I"
    dls = cinc2017_dls(args.cinc2017, lambda t: np.arange(len(t)) % 5 == 0, Preprocess(('ECG',), stride=1000, pad=True, **BAND))
    x, y = (np.concatenate([np.asarray(dls[i].dataset[:][k]) for i in (0,1)]) for k in (0,1))
    rows = np.concatenate([np.asarray(dls[i].dataset.split_idxs) for i in (0,1)])
    record, valid = np.asarray(dls.record)[rows], np.arange(len(x)) >= len(dls.train_ds)
    keep = np.zeros(len(x), bool)
    for r in np.unique(record): i = np.flatnonzero(record == r); keep[i[len(i)//2]] = True
    return ecg_dls(x[keep], y[keep], list(dls.vocab), valid[keep], replace(dls.prep, leads=('I',)))

def cinc2017(args, encs):
    dls, kept = one_lead(args), {}
    for (task,s),enc in encs.items():
        feats = layer_features(banded(enc), dls, cache=args.work/'cache')
        for k,p in fitted(args, feats, 'ridge_1_0', ridge_probe).items(): kept[task,k,f'{s}/0'] = p
        print('cinc2017', task, s, flush=True)
    write(args, 'cinc2017', summary(kept, labelled(feats, 1)[1], None, '8'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    for name in ('ludb', 'cinc2017', 'work'): p.add_argument(f'--{name}', type=Path, required=name == 'work')
    p.add_argument('--out', type=Path, default=Path('experiments/paper'))
    p.add_argument('--stages', nargs='+', default=['encoders', 'layers', 'leads', 'readouts', 'few', 'gates', 'ludb', 'cinc2017'])
    p.add_argument('--epochs', type=int, default=30, help='of pretraining')
    p.add_argument('--head-epochs', type=int, default=20)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--size', default='tiny')
    p.add_argument('--bs', type=int, default=32)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if 'encoders' in args.stages:
        for seed in args.seeds:
            for task in TASKS: pretrain(args, task, seed)
    encs, records = encoders(args), args.work/'records'
    dls = args.scored = ptbxl_dls(args.folder, 'superdiagnostic', bs=64, cache=records)
    choose = ptbxl_dls(args.folder, 'superdiagnostic', bs=64, train_folds=range(1,8), valid_folds=[8], cache=records)
    if 'layers' in args.stages: layers(args, dls, encs)
    if 'leads' in args.stages: leads(args, dls, encs)
    if 'readouts' in args.stages: readouts(args, dls, choose, encs)
    if 'few' in args.stages: few(args, dls, encs)
    if 'gates' in args.stages: gates(args, dls, choose, encs)
    if 'ludb' in args.stages: ludb(args, choose, encs)
    if 'cinc2017' in args.stages: cinc2017(args, encs)
    args.out.mkdir(parents=True, exist_ok=True)
    about = dict(scored=dls.protocol.on('valid').hash, chosen=choose.protocol.on('valid').hash, protocol=dls.protocol.on('valid').as_dict(),
                 versions=dict(python=platform.python_version(), **{n: version(n) for n in ('fastai_ecg_pma', 'torch', 'tsai', 'fastai', 'scikit-learn', 'numpy')}),
                 encoders=f'{args.size}, {args.epochs} epochs, seeds {args.seeds}', heads=f'{args.head_epochs} epochs, seeds {list(HEADS)}')
    (args.out/'about.json').write_text(json.dumps(about, indent=1, default=str))
