"""Which layer, which read-out? The encoders: a `tiny` ViT pretrained on PTB-XL folds 1-8 without labels, as STMEM and as IPASTMEM, from several seeds

    OMP_NUM_THREADS=1 python experiments/paper.py PTBXL_FOLDER --work WORK [--epochs 40] [--seeds 0 1 2]

Encoders go to WORK as they come; one that is there is not made again, one that was interrupted goes on from its last epoch.
"""
import argparse, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script'); warnings.filterwarnings('ignore', '.*enable_nested')
from pathlib import Path
from fastai_ecg_pma.aggregate import PPA, Last
from fastai_ecg_pma.checkpoint import Checkpoint
from fastai_ecg_pma.learner import pretrain_learner
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.weights import save_encoder

TASKS = dict(STMEM=Last, IPASTMEM=PPA)

def pretrain(args, task, seed):
    "An encoder in WORK"
    folder = args.work/f'{task}_{args.size}_{args.epochs}_{seed}'
    if (folder/'config.json').exists(): return folder
    print(folder.name, flush=True)
    learn = pretrain_learner(ptbxl_dls(args.folder, task=None, bs=args.bs), fuse=TASKS[task], size=args.size, seed=seed, cbs=Checkpoint(args.work/f'{folder.name}.checkpoints', keep=1))
    with learn.no_bar(): learn.fit_one_cycle(args.epochs, 1e-3, pct_start=.1)
    return save_encoder(learn.encoder, folder)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--work', type=Path, required=True)
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--size', default='tiny')
    p.add_argument('--bs', type=int, default=32)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for task in TASKS: pretrain(args, task, seed)
