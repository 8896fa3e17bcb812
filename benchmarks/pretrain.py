"""Speed of one pretraining step: against tsai's MVP, against ST-MEM written plainly, against the processor's matmul peak; its memory; long records

    OMP_NUM_THREADS=1 python benchmarks/pretrain.py [--threads 1] [--turns 5] [--only peak mvp stmem memory length] [--size small] [--device cpu] [--out benchmarks/results]

A step is everything between batch and next batch: the mask is drawn, forward, loss, backward, optimizer (fastai's Adam, as in `pretrain_learner`; the same for all),
gradients to zero. Records are 12 leads of noise, three quarters of the patches hidden, decoder of ST-MEM (256 wide, 4 layers). Float32, on a GPU also bfloat16, eager and compiled.

mvp     Ours against tsai's masked pretraining, on TSiTPlus of the same width, depth, heads (of 64 units) and MLP. MVP has no patches and hides single time steps, so it
        cannot pretrain a model of patch tokens at all. It gets what it can work on: a record of as many time steps as ours has tokens (visible, hidden and separators; 264
        for 1,000 samples in patches of 50), one token a step. So both see the same number of tokens, of the same width, in as many layers; ours encodes the
        visible ones and has a decoder besides, MVP encodes all. Mask, loss and head are MVP's own code. 'SDPA': the same with tsai's attention replaced by `use_sdpa`.
        The decoder is ST-MEM's, or the light one that `pretrain_learner` gives to encoders at most 128 wide. 'work' is what the FLOPs alone make of it.
stmem   Ours against the published algorithm written plainly: leads joined and decoded one after the other in a Python loop, attention by matmul and softmax. Linear layers,
        norms and weights are the same, and the losses are compared before the clock starts.
peak    Share of the matmul peak that a step reaches. The peak is that of the same turn: the best of square float32 matmuls of several sizes, right before the step.
        The work is counted by `FlopCounterMode` in the forward, three times: backward is twice the forward. (It counts attention's backward as 2.5 times the forward, what is
        computed there a second time included; here that counts as nothing.) A formula in this file has to give the same number.
memory  Peak of resident memory during a first step (gradients and the optimizer's state included), less what was resident before, each in a fresh process: see sdpa.py.
length  ms a record from 1,000 to 10,000 samples, patches of 50.

Who is compared takes turns in one process, after a step each that is not counted; who goes first moves on, and every other turn runs backwards. ms are medians; a ratio is
the median of each turn's ratio, with the lowest and the highest. Other work on the machine slows both, so read the ratio. Each line is written to a csv file in --out as soon as it
is measured, with the machine's load at that time. About ten minutes on one thread. What runs behind `--device cuda` has not been run yet: no GPU was at hand.
"""
import argparse, copy, csv, json, os, subprocess, sys, tempfile, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
import torch
from fastai.optimizer import Adam
from torch.utils.flop_counter import FlopCounterMode
from tsai.callback.MVP import MVP
from tsai.models.TSiTPlus import TSiTPlus
from fastai_ecg_pma.learner import LIGHT_DECODER
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse, patchify, per_lead, recorded, uniform
from fastai_ecg_pma.sdpa import use_sdpa
from fastai_ecg_pma.vit1d import VIT_SIZES, Attention, ViT1d
from gate import now, turns
from sdpa import resident

N_LEADS,RATIO = 12,0.75
PARTS = 'peak', 'mvp', 'stmem', 'memory', 'length'
DECODERS = {'ST-MEM': {}, 'light': LIGHT_DECODER}
MVP_CASES = ('tiny', 1000, 50, 4, 'light'), ('small', 1000, 50, 1, 'ST-MEM'), ('small', 1000, 50, 4, 'ST-MEM'), ('small', 1000, 50, 4, 'light'), ('base', 2250, 75, 2, 'ST-MEM')
SQUARES = 512, 1024, 2048                                               # of matmuls on a CPU; on a GPU 4 times as large

# ours
def ours(mae, x):
    "Loss of a step: what `MaskPatches` makes of a batch, the model, `masked_mse`"
    was = recorded(x, mae.ps)
    hidden = per_lead(uniform(len(x), x.device), was, RATIO)
    return masked_mse(mae(x, hidden), patchify(x, mae.ps), hidden & was)

def make(size, seq_len, ps, device, decoder='ST-MEM'): return MAE(ViT1d(seq_len, ps, **VIT_SIZES[size]), **DECODERS[decoder]).to(device)

# ST-MEM written plainly
class PlainAttention(Attention):
    "The scores of all pairs of tokens are formed, and kept for the backward"
    def forward(self, x, seen=None):
        q,k,v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2,0,3,1,4)
        return self.out(((q @ k.transpose(-2,-1) * q.shape[-1]**-0.5).softmax(-1) @ v).transpose(1,2).flatten(2))

def plainly(mae):
    "A copy of `mae` whose attention is `PlainAttention`"
    mae = copy.deepcopy(mae)
    for m in mae.modules():
        if type(m) is Attention: m.__class__ = PlainAttention
    return mae

def stmem(mae, x, noise=None):
    "Loss of a step of ST-MEM: patches in order of their noise, the first ones encoded, each lead decoded on its own"
    enc,patches = mae.encoder,patchify(x, mae.ps)
    noise = torch.rand(patches.shape[:3], device=x.device) if noise is None else noise
    order,n = noise.argsort(-1),int(patches.shape[2]*(1-RATIO))
    place,h = order.argsort(-1),enc.embed(patches) + enc.pos[1:-1]
    h = h.gather(2, order[:,:,:n,None].expand(-1,-1,-1,enc.d))
    sep = enc.sep.expand(len(x), 1, -1)
    h = torch.cat([torch.cat([sep, h[:,i], sep], 1) + enc.lead[i] for i in range(N_LEADS)], 1)
    for block in enc.blocks: h = block(h)
    h = mae.embed(enc.norm(h)).unflatten(1, (N_LEADS,-1))
    pred = torch.stack([decode(mae, h[:,i], place[:,i]) for i in range(N_LEADS)], 1)
    target = (patches - patches.mean(-1, keepdim=True))/(patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pred-target).pow(2).mean(-1)[place >= n].mean()

def decode(mae, h, place):
    "One lead: visible tokens and a mask token for each missing patch, put in order"
    missing = mae.mask_token.expand(len(h), place.shape[1]+2-h.shape[1], -1)
    tokens = torch.cat([h[:,1:-1], missing], 1).gather(1, place[...,None].expand(-1,-1,h.shape[2]))
    return mae.out(mae.norm(mae.blocks(torch.cat([h[:,:1], tokens, h[:,-1:]], 1) + mae.pos)))[:,1:-1]

def check_same(mae, plain, x):
    "Ours and the plain one are the same function: the same loss and gradients for the same noise"
    noise = torch.rand(len(x), N_LEADS, mae.encoder.n_patches, device=x.device)
    hidden = per_lead(lambda *shape: noise, recorded(x, mae.ps), RATIO)
    a,b = masked_mse(mae(x, hidden), patchify(x, mae.ps), hidden),stmem(plain, x, noise)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(l, list(m.parameters())) for l,m in ((a, mae), (b, plain))]
    for g,h in zip(*grads): torch.testing.assert_close(g, h, rtol=1e-2, atol=1e-3*float(g.abs().max()) + 1e-7)

# tsai's MVP
def mvp(size, n_tokens, bs, device, sdpa):
    "Model, and the loss of a step, by MVP's own `before_fit`, `before_batch` and `_loss`"
    vit = VIT_SIZES[size]
    model = TSiTPlus(N_LEADS, 1, n_tokens, d_model=vit['d'], depth=vit['n_layers'], n_heads=vit['n_heads'], mlp_ratio=4, verbose=False).to(device)
    if sdpa: use_sdpa(model)
    cb = MVP(r=RATIO, target_dir=tempfile.mkdtemp())
    cb.learn = SimpleNamespace(model=model, cbs=[], metrics=[], loss_func=None, dls=SimpleNamespace(vars=N_LEADS, len=n_tokens, device=device))
    cb.before_fit()
    cb.learn.x = torch.randn(bs, N_LEADS, n_tokens, device=device)
    def loss():
        cb.before_batch()
        return cb._loss(model(*cb.learn.xb), *cb.learn.yb)
    return model,loss

# a step
def stepper(model, loss, device, cast=nullcontext):
    "A function that takes one training step and returns its seconds"
    opt = Adam(model.train().parameters(), lr=1e-4, mom=0.9, sqr_mom=0.95, wd=0.01)
    def step():
        t = [now(device)]
        with cast(): l = loss()
        t.append(now(device)); l.backward()
        t.append(now(device)); opt.step(); opt.zero_grad()
        t.append(now(device))
        step.parts = [b-a for a,b in zip(t, t[1:])]                     # forward, backward, optimizer
        return t[-1] - t[0]
    return step

def records(bs, seq_len, device): return torch.randn(bs, N_LEADS, seq_len, device=device)

def spread(name, v): return {name: median(v), f'{name}_low': min(v), f'{name}_high': max(v)}

def against(steps, n):
    "`n` turns after one that is not counted. For all but the first, by name: median ms of the first and of it, and how many times faster the first is"
    for s in steps.values(): s()
    t,(first,*others) = turns(steps, n),steps
    return {o: dict(turns=n, ms=1000*median(i[first] for i in t), other_ms=1000*median(i[o] for i in t), **spread('times', [i[o]/i[first] for i in t])) for o in others}

# the work
def work(size, seq_len, ps, bs):
    "FLOPs of the forward, by hand: 2 for a weight and a token, 2 for a score and 2 for its use for each unit of a head and pair of tokens"
    d,L,heads = VIT_SIZES[size].values()
    n = seq_len//ps
    visible,full,inner = N_LEADS*(int(n*(1-RATIO))+2),N_LEADS*(n+2),64*heads
    def blocks(d, inner, n_layers, n_tokens, n_seen): return n_layers*n_tokens*(2*(4*d*inner + 8*d*d) + 4*n_seen*inner)
    return bs*(2*N_LEADS*n*ps*d + blocks(d, inner, L, visible, visible) + 2*visible*d*256 + blocks(256, 256, 4, full, n+2) + 2*N_LEADS*n*256*ps)

def counted(loss):
    with FlopCounterMode(display=False) as f: loss()
    return f.get_total_flops()

def square(n, device, dtype):
    a,b = (torch.randn(n, n, device=device, dtype=dtype) for _ in 'ab')
    def best():
        times = []
        for _ in range(max(3, 2048//n)):
            start = now(device); a @ b; times.append(now(device) - start)
        return 2*n**3/min(times)
    return best

# tables
class Table:
    "Lines on the screen and in a csv file, each as soon as it is there"
    def __init__(self, args, name): self.path,self.args,self.fresh = Path(args.out)/f'pretrain_{name}.csv',args,True
    def line(self, **row):
        run = dict(device=self.args.device, threads=self.args.threads, torch=torch.__version__, cpu=torch.backends.cpu.get_cpu_capability(), load=round(os.getloadavg()[0], 2))
        row = {k: float(f'{v:.5g}') if isinstance(v, float) else v for k,v in {**row, **run}.items()}
        with self.path.open('w' if self.fresh else 'a', newline='') as f:
            w = csv.DictWriter(f, row, lineterminator='\n')
            if self.fresh: w.writeheader()
            w.writerow(row)
        if self.fresh: print(f'\n{self.path.stem}\n' + ''.join(f'{k:>12}' for k in row if k not in run), flush=True)
        print(''.join(f'{v:>12.4g}' if isinstance(v, float) else f'{v:>12}' for k,v in row.items() if k not in run), flush=True)
        self.fresh = False

def shape(size, seq_len, ps, bs):
    n = seq_len//ps
    return dict(size=size, seq_len=seq_len, ps=ps, tokens=N_LEADS*(n+2), visible=N_LEADS*(int(n*(1-RATIO))+2), bs=bs)

# parts
def casts(device):
    "Ways to compute: name, dtype of the matmul that sets the peak, context, whether to compile"
    yield 'float32', torch.float32, nullcontext, False
    if device.type == 'cuda':
        half = partial(torch.autocast, 'cuda', torch.bfloat16)
        yield 'bfloat16', torch.bfloat16, half, False
        yield 'bfloat16, compiled', torch.bfloat16, half, True

def peak(args, device):
    table = Table(args, 'peak')
    for bs in args.bs:
        x,flops = records(bs, 1000, device),3*work(args.size, 1000, 50, bs)
        if (found := 3*counted(partial(ours, make(args.size, 1000, 50, device), x))) != flops: raise AssertionError(f'FlopCounterMode counts {found:,}, the formula says {flops:,}')
        for name,dtype,cast,fast in casts(device):
            mae = make(args.size, 1000, 50, device)
            step = stepper(mae, partial(torch.compile(ours) if fast else ours, mae, x), device, cast)
            squares = [square(n*(4 if device.type == 'cuda' else 1), device, dtype) for n in SQUARES]
            step(); step()
            t = [(max(s() for s in squares), step(), step.parts) for _ in range(args.turns)]
            table.line(**shape(args.size, 1000, 50, bs), dtype=name, turns=args.turns, gflop=flops/1e9, ms=1000*median(s for _,s,_ in t), records_s=bs/median(s for _,s,_ in t),
                       peak_gflops=median(p for p,_,_ in t)/1e9, **spread('share', [flops/s/p for p,s,_ in t]),
                       **{k: median(v[i]/s for _,s,v in t) for i,k in enumerate(('forward', 'backward', 'optimizer'))})

def versus_mvp(args, device):
    table = Table(args, 'mvp')
    for size,seq_len,ps,bs,decoder in MVP_CASES:
        s,mae = shape(size, seq_len, ps, bs),make(size, seq_len, ps, device, decoder)
        models = {'ours': (mae, partial(ours, mae, records(bs, seq_len, device))), **{n: mvp(size, s['tokens'], bs, device, sdpa) for n,sdpa in (('MVP', False), ('MVP, SDPA', True))}}
        flops = {n: counted(loss) for n,(_,loss) in models.items()}
        for other,row in against({n: stepper(*m, device) for n,m in models.items()}, args.turns).items():
            table.line(**s, decoder=decoder, against=other, **row, work=flops[other]/flops['ours'])

def versus_stmem(args, device):
    table = Table(args, 'stmem')
    for bs in args.bs:
        mae,x = make(args.size, 1000, 50, device),records(bs, 1000, device)
        plain = plainly(mae)
        check_same(mae, plain, x)
        steps = {'ours': stepper(mae, partial(ours, mae, x), device), 'plain': stepper(plain, partial(stmem, plain, x), device)}
        for other,row in against(steps, args.turns).items(): table.line(**shape(args.size, 1000, 50, bs), against=other, **row)

KINDS = {'ours': lambda mae, x: (mae, partial(ours, mae, x)), 'plain': lambda mae, x: (m := plainly(mae), partial(stmem, m, x))}

def extra_memory(kind, size, seq_len, bs):
    "MB of one training step in this process, over what was resident before it"
    device = torch.device('cpu')
    step = stepper(*KINDS[kind](make(size, seq_len, 50, device), records(bs, seq_len, device)), device)
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                       # forget the peak so far
    step()
    return resident('VmHWM') - before

def memory(args, device):
    table = Table(args, 'memory')
    for seq_len,bs in dict.fromkeys([*((1000, b) for b in args.bs), *((s, 4) for s in args.lengths)]):
        for kind in KINDS:
            cmd = [sys.executable, __file__, '--threads', str(args.threads), '--memory', kind, args.size, str(seq_len), str(bs)]
            mb = float(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout)
            table.line(**shape(args.size, seq_len, 50, bs), model=kind, mb=mb)

def length(args, device):
    table,bs = Table(args, 'length'),2
    for seq_len in args.lengths:
        mae,x = make(args.size, seq_len, 50, device),records(bs, seq_len, device)
        step = stepper(mae, partial(ours, mae, x), device)
        step()
        t = [1000*step()/bs for _ in range(args.turns)]
        table.line(**shape(args.size, seq_len, 50, bs), turns=args.turns, **spread('ms_a_record', t))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--turns', type=int, default=5)
    p.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    p.add_argument('--size', choices=VIT_SIZES, default='small')
    p.add_argument('--bs', type=int, nargs='+', default=[1, 4, 16])
    p.add_argument('--lengths', type=int, nargs='+', default=[1000, 2500, 5000, 10000])
    p.add_argument('--device', default='cpu')
    p.add_argument('--out', default=str(Path(__file__).parent/'results'))
    p.add_argument('--memory', nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    if args.memory: print(extra_memory(*args.memory[:2], *map(int, args.memory[2:]))); sys.exit()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    print(f'one pretraining step, {N_LEADS} leads, {RATIO:.0%} hidden, {args.device}, {args.threads} thread(s), {args.turns} turns, torch {torch.__version__}, '
          f'{torch.backends.cpu.get_cpu_capability()}')
    run = dict(zip(PARTS, (peak, versus_mvp, versus_stmem, memory, length)))
    for part in args.only: run[part](args, torch.device(args.device))
