"""What `compile_blocks`, `checkpoint_blocks` and `Autocast` cost and save in one pretraining step

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--size tiny] [--seq-len 10000] [--bs 2] [--reps 5] [--compile]

12 leads, patches of 50 samples, three quarters hidden; forward, backward, optimizer step. As in benchmarks/sdpa.py, models take turns in one process, the ms are medians, the ratio
is the median of each turn's ratio, and the peak of resident memory in a first step is measured in a fresh process (`VmHWM`; nan elsewhere than on Linux). `--compile` adds the time of
compiled layers (inductor, which needs a C++ compiler; the compilation itself is not counted).
"""
import argparse, json, subprocess, sys, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from pathlib import Path
from statistics import median
from time import perf_counter
import torch
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse, patchify, random_mask
from fastai_ecg_pma.scale import CastForward, checkpoint_blocks, compile_blocks
from fastai_ecg_pma.vit1d import VIT_SIZES, ViT1d

def half(model):
    model.forward = CastForward(model, torch.bfloat16)
    return model

WAYS = {'as it is': lambda m: m, 'checkpointed': checkpoint_blocks, 'bfloat16': half, 'compiled': compile_blocks}

def trainer(way, args):
    "A function that takes one training step of a fresh model and returns its seconds"
    torch.manual_seed(0)
    x, mask = torch.randn(args.bs, 12, args.seq_len), random_mask((args.bs, 12, args.seq_len//50))
    model = WAYS[way](MAE(ViT1d(args.seq_len, 50, **VIT_SIZES[args.size])))
    opt = torch.optim.AdamW(model.parameters())
    def step():
        start = perf_counter()
        masked_mse(model(x, mask), patchify(x, 50), mask).backward()
        opt.step(); opt.zero_grad()
        return perf_counter() - start
    return step

def resident(field): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(field))

def extra_memory(way, args):
    "MB of one training step in this process, over what was resident before it"
    if not Path('/proc/self/clear_refs').exists(): return float('nan')
    step = trainer(way, args)
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                       # forget the peak so far
    step()
    return resident('VmHWM') - before

def in_fresh_process(way):
    return json.loads(subprocess.run([sys.executable, *sys.argv, '--memory', way], stdout=subprocess.PIPE, text=True, check=True).stdout)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', choices=VIT_SIZES, default='tiny')
    p.add_argument('--seq-len', type=int, default=10000)
    p.add_argument('--bs', type=int, default=2)
    p.add_argument('--reps', type=int, default=5)
    p.add_argument('--compile', action='store_true')
    p.add_argument('--memory', choices=WAYS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory: print(json.dumps(extra_memory(args.memory, args))); sys.exit()
    ways = [w for w in WAYS if args.compile or w != 'compiled']
    print(f'one pretraining step, {args.size}, 12 leads x {args.seq_len} samples, bs {args.bs}, {torch.get_num_threads()} thread(s), {args.reps} turns, '
          f'torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}')
    memory = {w: in_fresh_process(w) for w in ways if w != 'compiled'}
    steps = {w: trainer(w, args) for w in ways}
    for step in steps.values(): step()
    turns = [{w: steps[w]() for w in (ways if r%2 else ways[::-1])} for r in range(args.reps)]
    for w in ways:
        ratio = [t['as it is']/t[w] for t in turns]
        print(f'{w:14}{1000*median(t[w] for t in turns):8.0f} ms{median(ratio):8.2f} times as fast ({min(ratio):.2f} to {max(ratio):.2f})'
              + (f'{memory[w]:10.0f} MB' if w in memory else ''), flush=True)
