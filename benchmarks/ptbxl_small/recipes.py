"""Recipes: YAML files beside this script, for `ecg-pma train`, run for a group of folds"""
import hashlib, json, os, time, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
import pandas as pd
from fastai_ecg_pma.config import Config, read_config
from fastai_ecg_pma.trainings import pretrain, train

HERE, GROUPS = Path(__file__).parent, [(1,2), (3,4), (5,6), (7,8), (9,)]
TASKS = dict(classes={}, statements=dict(task='all', min_positives=10))

def rest(group): return [f for f in range(1, 10) if f not in group]

def records(args, g, share=1., seed=0): return dict(TASKS[args.task], train_folds=rest(GROUPS[g]), valid_folds=list(GROUPS[g]), share=share, seed=seed)

def file_name(name):
    "A recipe with its changes as the name of a folder, which may have 255 letters"
    text = name.replace(' ', '_')
    return text if len(text) < 240 else f'{text[:200]}…{hashlib.sha1(text.encode()).hexdigest()[:8]}'

def folder_of(args, name, seed, share, g): return args.work/file_name(name)/str(seed)/(f'group{g}' + ('' if share == 1 else f'_share{share:g}') + ('' if args.task == 'classes' else f'_{args.task}'))

def timed(folder, f):
    folder.mkdir(parents=True, exist_ok=True)
    t = time.time(); f()
    (folder/'minutes').write_text(f'{(time.time()-t)/60:.1f}')

def epochs(n, share):
    "As many steps of the optimiser whatever the share of the labels"
    return round(n/share)

def recipe(name):
    "`hybrid`, or with changes as in the shell, `hybrid model.readout=Concat`"
    file, *changes = name.split(' ')
    c = Config(train, 'values').update(read_config(HERE/f'{file}.yaml'))
    for key,text in (change.split('=', 1) for change in changes): c.set(key, text)
    return c

def encoder(args, c, seed, n_epochs=None):
    "Folder of the run that pretrains the encoder of a recipe, on folds 1-8 without labels, for as many epochs as it says or for `n_epochs`. It holds `encoder` and `minutes`"
    first = c.values['pretraining']
    told = dict(data=dict(train_folds=list(range(1, 9)), batch_tfms=first['batch_tfms']), fit=dict(first['fit'], epochs=n_epochs or first['fit']['epochs']), seed=seed,
                model={**{k: c.values['model'][k] for k in ('arch', 'arch_config', 'size')}, **first['model']})
    out = args.work/'encoders'/f'{told["fit"]["epochs"]}_epochs_seed_{seed}_{hashlib.sha1(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]}'
    if not (out/'encoder').exists():
        run = Config(pretrain, 'values').update(told).update(dict(data=dict(folder=args.folder, cache=str(args.work/'cache')), out=str(out)))
        timed(out, lambda: run.call(values=run.values))
    return out

def trained(args, name, seed, share, g):
    "Predictions of a recipe for the records of a group"
    out, c = folder_of(args, name, seed, share, g), recipe(name)
    if not (out/'predictions.csv').exists():
        if c.values['pretraining']: c.update(dict(model=dict(arch=str(encoder(args, c, seed)/'encoder'), arch_config=None), pretraining=None))
        c.update({k: dict(epochs=epochs(c.values[k]['epochs'], share)) for k in ('fit', 'scratch') if c.values[k]})
        c.update(dict(data=dict(folder=args.folder, cache=str(args.work/'cache'), **records(args, g, share, seed)), seed=seed, out=str(out)))
        timed(out, lambda: c.call(values=c.values))
    return pd.read_csv(out/'predictions.csv')
