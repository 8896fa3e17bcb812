"""Hand-written tsai attention against `use_sdpa`: time and memory of a training step

    OMP_NUM_THREADS=1 python benchmarks/sdpa.py [--threads 1] [--bs 2] [--reps 3]

12 leads x 1,000 samples; forward, backward, optimizer step. The two models of a row start from the same weights and take turns in one process, after one
step each that is not counted; who goes first alternates. The ms are medians; the ratio is the median of each turn's ratio, with the lowest and the highest.
Other work on the machine slows both, so read the ratio. It depends on the processor: nearly all of SDPA's time is spent in PyTorch's own CPU kernel.

Memory is the peak of resident memory during a first step (gradients and the optimizer's state included), less what was resident before it, each in a fresh
process: `VmHWM` of /proc/self/status, reset before the step. Not `ru_maxrss`, which also holds the peak of the imports and, on Linux, of the process that
started this one. Elsewhere than on Linux the column is nan. About two minutes on one thread.
"""
import argparse, json, subprocess, sys, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
import torch
from tsai.models.PatchTST import PatchTST
from tsai.models.TSiTPlus import TSiTPlus
from tsai.models.TSTPlus import TSTPlus
from fastai_ecg_pma.sdpa import use_sdpa

N_LEADS,N_OUT,SEQ_LEN = 12,5,1000
MODELS = {'TSTPlus, 1000 tokens': partial(TSTPlus, max_seq_len=None, res_attention=False), 'TSiTPlus, 1001 tokens': partial(TSiTPlus, use_token=True),
          'PatchTST, 12 x 126 tokens': partial(PatchTST, pred_dim=N_OUT, res_attention=False)}     # by default its head predicts all 1,000 samples

def trainer(name, fast, bs):
    "A function that takes one training step of a fresh model and returns its seconds"
    torch.manual_seed(0)
    x,model = torch.randn(bs, N_LEADS, SEQ_LEN),MODELS[name](N_LEADS, N_OUT, SEQ_LEN)
    if fast: use_sdpa(model)
    opt = torch.optim.Adam(model.parameters())
    def step():
        start = perf_counter()
        model(x.clone()).pow(2).mean().backward()
        opt.step(); opt.zero_grad()
        return perf_counter() - start
    return step

def times(name, bs, reps):
    "`[reps,2]` seconds: hand-written, SDPA"
    steps = [trainer(name, fast, bs) for fast in (False, True)]
    for step in steps: step()
    turns = [{i: steps[i]() for i in ((0,1), (1,0))[r%2]} for r in range(reps)]
    return [(t[0], t[1]) for t in turns]

def resident(field): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(field))

def extra_memory(name, fast, bs):
    "MB of one training step in this process, over what was resident before it"
    if not Path('/proc/self/clear_refs').exists(): return float('nan')
    step = trainer(name, fast, bs)
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                       # forget the peak so far
    step()
    return resident('VmHWM') - before

def in_fresh_process(name, fast, args):
    cmd = [sys.executable, __file__, '--threads', str(args.threads), '--bs', str(args.bs), '--memory', name, *(['--fast'] if fast else [])]
    return json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--bs', type=int, default=2)
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--memory', choices=MODELS, help=argparse.SUPPRESS)
    p.add_argument('--fast', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory: print(json.dumps(extra_memory(args.memory, args.fast, args.bs))); sys.exit()
    print(f'one training step, {N_LEADS} leads x {SEQ_LEN} samples, bs {args.bs}, {args.threads} thread(s), {args.reps} turns, '
          f'torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}')
    print(f'{"":28}{"hand-written":>13}{"SDPA":>9}{"times faster":>20}{"hand-written":>15}{"SDPA":>9}{"less":>8}')
    for name in MODELS:
        t = times(name, args.bs, args.reps)
        (hand,sdpa),ratio = (1000*median(c) for c in zip(*t)),[h/s for h,s in t]
        a,b = (in_fresh_process(name, fast, args) for fast in (False, True))
        print(f'{name:28}{hand:10.0f} ms{sdpa:6.0f} ms{median(ratio):8.1f} ({min(ratio):.1f} to {max(ratio):.1f}){a:12.0f} MB{b:6.0f} MB{a/b:7.1f}x', flush=True)
