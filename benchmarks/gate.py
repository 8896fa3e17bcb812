"""What it costs to read all layers: parameters, time and memory of a training step, against the last-layer head

    OMP_NUM_THREADS=1 python benchmarks/gate.py [--size base] [--frozen] [--threads 1] [--bs 2] [--reps 3] [--device cpu] [--no-tsai]

ViT1d on 12 leads x 2,250 samples, patches of 75: forward, backward, AdamW step, all parameters trained; `--frozen` trains the head alone. `--size small` is a
quick look. Then two small tsai models, 12 leads x 1,000 samples in 50 tokens, with 4 times the records and 5 times the turns.

The models of a table share one encoder, its gradients and its optimizer's state: they differ in the read-out alone. They take turns in one process, after one
step each that is not counted; who goes first moves on, and every other turn runs backwards. The ms are medians; 'by Last' is the median of each turn's time by
that of Last in the same turn, with the lowest and the highest. 'Last, again' is Last a second time: what its ratio is off 1, any ratio may be off by chance.
'no stack' is the plain way: the encoder's own output, its mean over tokens, the same head.

A gate is small beside that noise, so 'alone' takes a training step of the read-out and classifier on a stack that is there already (gradient of the stack
included), 100 turns: what a read-out takes longer than Last, median of the turns' differences, in % of a whole step of Last.

Memory is the peak of what tensors hold during a step, over what they held before it. AdamW's two moments come on top, 8 bytes a parameter, and so do the
parameters, 4. About four minutes on one thread, less with `--frozen`.
"""
import argparse, os, warnings
os.environ.setdefault('KINETO_LOG_LEVEL', '99')                         # PyTorch's profiler announces itself otherwise
warnings.filterwarnings('ignore', '.*torch.jit.script')
from functools import partial
from itertools import accumulate
from statistics import median
from time import perf_counter
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import ProfilerActivity, profile
from tsai.models.TSiTPlus import TSiTPlus
from tsai.models.TSTPlus import TSTPlus
from fastai_ecg_pma.aggregate import PPA, FusedModel, Last, ReadOut, Static, mlp_head
from fastai_ecg_pma.encoder import make_trainable
from fastai_ecg_pma.gate import PMA
from fastai_ecg_pma.layers import LayerStack
from fastai_ecg_pma.vit1d import VIT_SIZES, ViT1d

N_LEADS,N_OUT = 12,71
READOUTS = {'Last': Last, 'Last, again': Last, 'PPA': PPA, 'Static': Static, 'PMA': PMA}
TSAI = {'TSTPlus, 50 tokens': partial(TSTPlus, max_seq_len=50), 'TSiTPlus, 50 tokens': partial(TSiTPlus, token_size=20, verbose=False)}

def n_params(m): return sum(p.numel() for p in m.parameters())

def read_outs(enc, seq_len):
    "Models that share `enc` and differ in how they read it; the plain way is the last"
    stack = make_trainable(LayerStack(enc, (N_LEADS, seq_len)))
    models = {name: FusedModel(stack, ReadOut(f(stack.n_layers, stack.d), mlp_head(stack.d, N_OUT))) for name,f in READOUTS.items()}
    tokens = getattr(enc, 'backbone', enc)                              # `[bs,d,n_tokens]`, of tsai's models as of ours
    return {**models, 'no stack': nn.Sequential(tokens, nn.AdaptiveAvgPool1d(1), nn.Flatten(), mlp_head(stack.d, N_OUT))}

def now(device):
    if device.type == 'cuda': torch.cuda.synchronize()
    return perf_counter()

def trainer(models, bs, device):
    "A function that takes one training step from the logits `f()` on and returns its seconds. One optimizer for all models: it passes by what got no gradient"
    params = [p for p in nn.ModuleList(models.values()).parameters() if p.requires_grad]
    opt,y = torch.optim.AdamW(params, lr=1e-4),torch.rand(bs, N_OUT, device=device).round()
    def step(f):
        start = now(device)
        binary_cross_entropy_with_logits(f(), y).backward()
        opt.step(); opt.zero_grad()
        return now(device) - start
    return step

def alone(m, h, grad):
    "Logits of the head of `m` on a stack that is there already"
    return lambda: m.head(h.detach().requires_grad_(grad), m.backbone.norm)

def turns(steps, n):
    "`n` turns, each the seconds of every step"
    names = list(steps)
    return [{k: steps[k]() for k in (names[r%len(names):] + names[:r%len(names)])[::(1,-1)[r%2]]} for r in range(n)]

def peak(step, device):
    "MB that tensors hold at most during a step, over what they held before it"
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof: step()
    taken = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(accumulate(n for _,n in taken))/2**20

def report(title, enc, seq_len, bs, reps, args):
    torch.manual_seed(0)
    device = torch.device(args.device)
    enc,x = enc.to(device),torch.randn(bs, N_LEADS, seq_len, device=device)
    models = {n: m.to(device).train() for n,m in read_outs(enc, seq_len).items()}
    n_enc,fused = n_params(enc),{n: m for n,m in models.items() if isinstance(m, FusedModel)}
    if args.frozen: enc.requires_grad_(False).eval()
    step = trainer(models, bs, device)
    whole = {n: partial(step, partial(m, x)) for n,m in models.items()}
    whole['Last']()                                                     # makes the optimizer's state of the encoder
    memory = {n: peak(s, device) for n,s in whole.items()}
    t = turns(whole, reps)
    with torch.no_grad(): h = models['Last'].stack(x)
    s = turns({n: partial(step, alone(m, h, not args.frozen)) for n,m in fused.items()}, 110)[10:]
    print(f'\n{title}: {n_enc:,} parameters, bs {bs}, {reps} turns\n'
          f'{"":12}{"parameters, of the encoder":>28}{"a step":>13}{"by Last":>22}{"alone":>16}{"over Last":>13}{"memory":>13}')
    for n,m in models.items():
        ratio,extra = [r[n]/r['Last'] for r in t],n_params(m.head.fuse) if n in fused else 0
        over = 100*median(r[n]-r['Last'] for r in s)/median(r['Last'] for r in t) if n in fused else None
        print(f'{n:12}{extra:16,} = {100*extra/n_enc:6.3f} %{1000*median(r[n] for r in t):10.1f} ms{median(ratio):10.3f} ({min(ratio):.2f} to {max(ratio):.2f})'
              + (f'{1000*median(r[n] for r in s):10.2f} ms{over:+11.3f} %' if n in fused else ' '*26) + f'{memory[n]:10.1f} MB', flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', choices=VIT_SIZES, default='base')
    p.add_argument('--frozen', action='store_true', help='train the head alone')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--bs', type=int, default=2)
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--device', default='cpu')
    p.add_argument('--no-tsai', action='store_true', help='the ViT alone')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f'one training step, {"head alone" if args.frozen else "all parameters"}, {args.device}, {args.threads} thread(s), '
          f'torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}')
    report(f'ViT1d {args.size}', ViT1d(2250, 75, **VIT_SIZES[args.size]), 2250, args.bs, args.reps, args)
    for name,arch in ({} if args.no_tsai else TSAI).items(): report(name, arch(N_LEADS, N_OUT, 1000), 1000, 4*args.bs, 5*args.reps, args)
