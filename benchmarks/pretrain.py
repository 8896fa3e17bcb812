"""What a step of masked pretraining costs: against tsai's MVP, against ST-MEM written plainly, against the machine's peak, and in memory

    OMP_NUM_THREADS=1 python benchmarks/pretrain.py [--only mvp stmem peak malloc length memory] [--threads 1] [--seconds 20] [--device cpu] [--out benchmarks/pretrain]

A step is what a `Learner` does with one batch: draw the mask, forward, loss, backward, AdamW (`FusedAdam`), gradients to zero; everything is trained. Records have 12 leads and are
random numbers, three quarters are hidden. Ours is `pretrain_learner` with `ViT1d`: `tiny` with its default light decoder (`LIGHT_DECODER`), `small` and `base` with ST-MEM's (256 wide, 4
blocks) but for the row that says otherwise.

mvp     tsai's `MVP(r=.75)` on a pre-norm `TSiTPlus` of the same width, depth, heads and MLP ratio. MVP cannot hide patches, it gives every sample a token: it gets records of 12 leads with
        as many samples as ours has tokens, hidden, visible and separators together (12 x (20+2) = 264 for 1,000 samples in patches of 50). 'MVP' is as tsai computes attention, 'MVP,
        SDPA' after our `use_sdpa`. It has no decoder but one convolution of width one. 'by FLOPs' is what the ratio would be if both computed as many FLOPs a second.
stmem   the published algorithm written plainly (`PlainSTMEM`): attention by matmul and softmax, one lead decoded after the other. A copy of our weights; that its loss and gradients
        are ours is asserted before the clock starts.
peak    FLOPs of a step by those of the best square float32 matrix product (of five sizes) in the same time. FLOPs are counted by `FlopCounterMode` and asserted to equal `gflop`, a
        formula; that SDPA computes its scores once more in its backward is not counted as work done. `share` compares with the product that took its turn before the step, `of best`
        with the fastest single product of the run. With the share of the step that goes into forward, backward, optimizer and the rest.
malloc  the same step in fresh processes, with and without glibc's `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TOP_PAD_`: does it pay to keep freed memory?
length  ms a record from 1,000 to 10,000 samples in patches of 50, as many records a batch as make 10,000 samples; ours, and MVP with SDPA
memory  peak of resident memory during a first step (gradients and the optimizer's state included) over what was resident before it, each in a fresh process: `VmHWM`, as in sdpa.py

Models of a row take turns in one process after one step each that is not counted, who goes first moves on; a ratio is the median of each turn's ratio, with the lowest and the highest.
A row has as many turns as fit in `--seconds`, between 3 and 9.
On one CPU thread a second is a second of this process on the processor, so that other work on the machine counts less; else it is one on the clock.

`--device cuda` adds to `peak` the rows bf16 (fastai's mixed precision, by the bf16 peak) and bf16 with `torch.compile`, and takes memory from CUDA's allocator; batches are larger. These lines
were never run on a GPU. Each row is printed and written to a csv in `--out` as it comes. About a quarter of an hour on one
thread of an idle machine.
"""
import argparse, csv, json, os, subprocess, sys, tempfile, warnings
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
warnings.filterwarnings('ignore', '.*torch.jit.script')
from copy import deepcopy
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter, process_time
import numpy as np, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Recorder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tsai.callback.MVP import MVP
from tsai.models.TSiTPlus import TSiTPlus
from fastai_ecg_pma.adam import FusedAdam
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.learner import LIGHT_DECODER, pretrain_learner
from fastai_ecg_pma.masking import masked_mse, patchify, random_mask
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.sdpa import use_sdpa
from fastai_ecg_pma.vit1d import VIT_SIZES, ViT1d
from gate import turns
from sdpa import resident

N_LEADS,RATIO = 12,.75
SQUARES = 512,768,1000,1536,2048
KEEP = dict(MALLOC_TRIM_THRESHOLD_='17179869184', MALLOC_MMAP_THRESHOLD_='4294967296', MALLOC_TOP_PAD_='268435456')
MVP_ROWS = [('tiny', 1000, 50, 32), ('small', 1000, 50, 4), ('small', 2250, 75, 4), ('small', 5000, 50, 1), ('small, light decoder', 1000, 50, 4), ('base', 1000, 50, 2),
            ('small', 1000, 50, 16), ('small, light decoder', 1000, 50, 16)]
STMEM_ROWS = [('small', 1000, 50, bs) for bs in (1,4,16)] + [('small', 2250, 75, bs) for bs in (1,4)]
PEAK_ROWS = [('small', 1000, 50, 4), ('small', 1000, 50, 16), ('small', 2250, 75, 8), ('base', 1000, 50, 4), ('tiny', 1000, 50, 64)]
LENGTHS = 1000,2500,5000,10000
MEMORY_ROWS = [(1000,b) for b in (1,2,8,16)] + [(s,2) for s in LENGTHS[1:]]
HAND_WRITTEN_TO = 2500                                                  # samples; longer records would take MVP's own attention gigabytes a record

def n_tokens(seq_len, ps): return N_LEADS*(seq_len//ps + 2)

# -- the learners

def dls_of(seq_len, bs):
    prep = Preprocess(fs=100, seq_len=seq_len)
    return ecg_dls(np.random.default_rng(0).standard_normal((bs+1, N_LEADS, seq_len), np.float32), valid=np.arange(bs+1) == bs, prep=prep, bs=bs)

def ours(size, seq_len, ps, bs):
    torch.manual_seed(0)
    size,_,light = size.partition(', ')
    return pretrain_learner(dls_of(seq_len, bs), ViT1d(seq_len, ps, **VIT_SIZES[size]), ratio=RATIO, decoder=LIGHT_DECODER if light else None, seed=0)

def mvp(size, seq_len, ps, bs, fast=False):
    n,s = n_tokens(seq_len, ps),VIT_SIZES[size.split(',')[0]]
    model = TSiTPlus(N_LEADS, 2, n, d_model=s['d'], depth=s['n_layers'], n_heads=s['n_heads'], mlp_ratio=4, pre_norm=True, verbose=False)
    return Learner(dls_of(n, bs), use_sdpa(model) if fast else model, loss_func=nn.MSELoss(), opt_func=partial(FusedAdam, sqr_mom=0.95), wd=0.01,
                   cbs=MVP(r=RATIO, target_dir=tempfile.gettempdir(), save_best=False))

def plain(size, seq_len, ps, bs):
    learn = ours(size, seq_len, ps, bs)
    learn.model = PlainSTMEM(learn.model)
    return learn

LEARNERS = {'ours': ours, 'MVP': mvp, 'MVP, SDPA': partial(mvp, fast=True), 'plain ST-MEM': plain}

# -- ST-MEM written plainly

def plain_attention(m, x):
    "Attention with the weights of `m`, scores and all"
    q,k,v = (t.unflatten(-1, (m.n_heads,-1)).transpose(1,2) for t in m.qkv(x).chunk(3, -1))
    w = (torch.matmul(q, k.transpose(-1,-2)) * q.shape[-1]**-.5).softmax(-1)
    return m.out(torch.matmul(w, v).transpose(1,2).flatten(2))

def plain_block(m, x):
    x = x + plain_attention(m.attn, m.norm1(x))
    return x + m.mlp(m.norm2(x))

class PlainSTMEM(nn.Module):
    "ST-MEM's pretraining as it is told (arXiv 2402.09450), with a copy of the weights of an `MAE`"
    def __init__(self, mae):
        super().__init__()
        self.mae = deepcopy(mae)

    def forward(self, x, mask):
        order = mask.long().argsort(dim=-1, stable=True)                  # visible patches first, each part in time order
        back,n_visible = order.argsort(-1),int((~mask[0,0]).sum())
        return self.decode(self.encode(x, order[...,:n_visible]), back)

    def encode(self, x, visible):
        enc,leads = self.mae.encoder,[]
        for i in range(x.shape[1]):
            p = enc.embed(x[:,i].unflatten(-1, (-1,enc.ps))) + enc.pos[1:-1]
            p = torch.gather(p, 1, visible[:,i,:,None].expand(-1,-1,enc.d))
            left,right = ((enc.sep + enc.pos[j]).expand(len(x), 1, -1) for j in (0,-1))
            leads.append(torch.cat([left, p, right], 1) + enc.lead[enc.lead_idx[i]])
        h = torch.cat(leads, 1)
        for block in enc.blocks: h = plain_block(block, h)
        return enc.norm(h)

    def decode(self, h, back):
        dec,out = self.mae,[]
        h = dec.embed(h).unflatten(1, (back.shape[1],-1))
        for i in range(back.shape[1]):
            p = h[:,i,1:-1]
            hidden = dec.mask_token.expand(len(p), back.shape[2]-p.shape[1], -1)
            p = torch.gather(torch.cat([p, hidden], 1), 1, back[:,i,:,None].expand(-1,-1,p.shape[-1]))
            z = torch.cat([h[:,i,:1], p, h[:,i,-1:]], 1) + dec.pos
            for block in dec.blocks: z = plain_block(block, z)
            out.append(dec.out(dec.norm(z))[:,1:-1])
        return torch.stack(out, 1)

def assert_same(mae, stmem, x):
    "The same loss and the same gradients on a batch"
    mask = random_mask((*x.shape[:2], x.shape[2]//mae.ps), RATIO, device=x.device)
    losses = [masked_mse(m(x, mask), patchify(x, mae.ps), mask) for m in (mae, stmem)]
    grads = [torch.autograd.grad(l, list(m.parameters())) for l,m in zip(losses, (mae, stmem.mae))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for a,b in zip(*grads): torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3*float(a.abs().max()) + 1e-7)

# -- the clock

def clock(args):
    if args.device == 'cuda': torch.cuda.synchronize()
    return process_time() if args.device == 'cpu' and args.threads == 1 else perf_counter()

class Stopwatch(Callback):
    "Seconds of the last step's forward, backward and optimizer"
    order = 100
    def __init__(self, now): self.now,self.t = now,{}
    def before_batch(self): self.start = self.now()
    def after_pred(self): self.t['forward'] = self.now() - self.start
    def before_backward(self): self.start = self.now()
    def after_backward(self): self.t['backward'] = self.now() - self.start
    def before_step(self): self.start = self.now()
    def after_step(self): self.t['optimizer'] = self.now() - self.start

def begin(learn, args):
    "What `fit` does before its first batch, and a batch"
    b = learn.dls.to(args.device).one_batch()
    learn.remove_cbs([ProgressCallback, Recorder])
    learn.model.to(args.device)
    learn.n_epoch,learn.n_iter,learn.epoch,learn.dl = 1,1,0,learn.dls.train
    for event in ('before_fit','before_epoch','before_train'):
        learn(event)
        if event == 'before_fit': learn.create_opt()                    # after MVP has put on its head
    learn.opt.set_hypers(lr=1e-4)
    return b

def stepper(learn, args):
    "A function that takes one step and returns its seconds"
    b = begin(learn, args)
    def step():
        start = clock(args)
        learn.one_batch(0, b)
        return clock(args) - start
    return step

# -- the tables

def write(args, table, row):
    "Append a row to a table's csv, a new file for the first row of a run"
    path,first = args.out/f'{table}.csv',table not in args.begun
    args.begun.add(table)
    with path.open('w' if first else 'a', newline='') as f:
        row = {**row, 'load': os.getloadavg()[0], **args.machine}
        w = csv.DictWriter(f, row, lineterminator='\n')
        if first: w.writeheader()
        w.writerow({k: f'{v:.5g}' if isinstance(v, float) else v for k,v in row.items()})

def timed_turns(steps, args):
    "As many turns as fit into the time for a row, after one that is not counted"
    first, = turns(steps, 1)
    return turns(steps, min(9, max(3, int(args.seconds/sum(first.values())))))

def spread(v): return dict(ratio=float(median(v)), low=float(min(v)), high=float(max(v)))

def compared(args, table, names, size, seq_len, ps, bs):
    "Ours against others in turns: a row each"
    if args.device == 'cuda': bs *= 16
    learners = {n: LEARNERS[n](size, seq_len, ps, bs) for n in names}
    steps = {n: stepper(l, args) for n,l in learners.items()}
    if 'plain ST-MEM' in names: assert_same(learners['ours'].model, learners['plain ST-MEM'].model, torch.randn(bs, N_LEADS, seq_len, device=args.device))
    work = {n: counted(step) for n,step in steps.items()}
    t = timed_turns(steps, args)
    s = {n: median(r[n] for r in t) for n in names}
    for n in names[1:]:
        r = spread([r[n]/r['ours'] for r in t])
        write(args, table, dict(against=n, size=size, seq_len=seq_len, ps=ps, tokens=n_tokens(seq_len, ps), bs=bs, turns=len(t), records_s=bs/s['ours'],
                                records_s_other=bs/s[n], **r, by_flops=work[n]/work['ours']))
        print(f'{size:21}{seq_len:5} samples, {n_tokens(seq_len, ps):5} tokens, bs {bs:3}: {bs/s["ours"]:8.2f} records/s, {n:13}{bs/s[n]:8.2f} '
              f'{r["ratio"]:6.2f} times faster ({r["low"]:.2f} to {r["high"]:.2f}), {work[n]/work["ours"]:.2f} by FLOPs', flush=True)

def mvp_table(args):
    for row in MVP_ROWS: compared(args, 'mvp', ['ours','MVP','MVP, SDPA'], *row)

def stmem_table(args):
    for row in STMEM_ROWS: compared(args, 'stmem', ['ours','plain ST-MEM'], *row)

# -- share of the peak

def gflop(mae, bs):
    "GFLOP of a step: each product forward, and twice that backward"
    def block(b, n, n_keys):                                            # qkv, scores and sums, out, MLP
        d,inner = b.attn.out.out_features,b.attn.out.in_features
        return 2*n*(3*d*inner + 2*n_keys*inner + inner*d + 2*d*b.mlp[0].out_features)
    enc,k = mae.encoder,int(mae.encoder.n_patches*(1-RATIO))
    d,dd,n = enc.d,mae.embed.out_features,N_LEADS*enc.n_patches
    seen,every = N_LEADS*(k+2),N_LEADS*(enc.n_patches+2)
    forward = 2*n*enc.ps*d + sum(block(b, seen, seen) for b in enc.blocks) + 2*seen*d*dd + sum(block(b, every, enc.n_patches+2) for b in mae.blocks) + 2*n*dd*enc.ps
    return 3*bs*forward/1e9

def counted(step):
    "GFLOP of a step as PyTorch counts them, less the scores that SDPA's backward computes once more: one of its five products"
    with FlopCounterMode(display=False) as c: step()
    ops = c.get_flop_counts()['Global']
    again = sum(f for op,f in ops.items() if 'attention' in str(op) and 'backward' in str(op))/5
    return (sum(ops.values()) - again)/1e9

def products(args, dtype):
    "Functions that multiply square matrices, by size"
    return {n: partial(torch.matmul, *torch.randn(2, n, n, device=args.device, dtype=dtype)) for n in (SQUARES if args.device == 'cpu' else (4096,8192,16384))}

def rate(f, n, args, seconds=0):
    "GFLOP/s of the product of size `n`: the fastest one, and all of at least `seconds`"
    times = [_timed(f, args)]
    while sum(times) < seconds: times.append(_timed(f, args))
    return 2e-9*n**3/min(times), 2e-9*n**3*len(times)/sum(times)

def _timed(f, args):
    start = clock(args); f()
    return clock(args) - start

def peak_rows(args, size, seq_len, ps, bs, kind='float32'):
    "One row: the share of the matrix product's rate that a step reaches"
    if args.device == 'cuda': bs *= 16
    learn = ours(size, seq_len, ps, bs)
    if 'bf16' in kind: learn.to_bf16()
    watch = Stopwatch(partial(clock, args))
    learn.add_cb(watch)
    step,work = stepper(learn, args),gflop(learn.model, bs)
    n_counted = counted(step)
    assert abs(n_counted/work-1) < 1e-6 or args.device == 'cuda', f'{n_counted} GFLOP counted, {work} by the formula'
    if 'compile' in kind: learn.model = torch.compile(learn.model)
    mm = products(args, torch.bfloat16 if 'bf16' in kind else torch.float32)
    for n,f in mm.items(): f()
    n = max(mm, key=lambda n: rate(mm[n], n, args, .3)[1])
    best,t,faults,parts = 0,[],[],[]
    first = [step() for _ in range(2)][-1]
    for _ in range(min(9, max(3, int(args.seconds/(first+.5))))):
        fastest,r = rate(mm[n], n, args, .5)
        before,s = getrusage(RUSAGE_SELF).ru_minflt,step()
        faults.append(getrusage(RUSAGE_SELF).ru_minflt - before); parts.append({k: v/s for k,v in watch.t.items()}); t.append((s, work/s/r)); best = max(best, fastest)
    s,part = median(s for s,_ in t),{k: median(p[k] for p in parts) for k in parts[0]}
    share = spread([r for _,r in t])
    write(args, 'peak', dict(size=size, seq_len=seq_len, ps=ps, bs=bs, kind=kind, gflop=work, ms=1000*s, records_s=bs/s, product=n, product_gflops=best, share=share['ratio'], low=share['low'],
                             high=share['high'], of_best=work/s/best, **part, rest=1-sum(part.values()), faults=int(median(faults)), turns=len(t)))
    print(f'{size:6}{seq_len:6} samples, bs {bs:3}, {kind}: {work:8.2f} GFLOP in {1000*s:6.0f} ms, {100*share["ratio"]:.0f} % of a {n} square product ({100*share["low"]:.0f} to {100*share["high"]:.0f}), '
          f'{100*work/s/best:.0f} % of best; ' + ', '.join(f'{k} {100*v:.0f} %' for k,v in part.items()) + f'; {int(median(faults))} page faults', flush=True)

def peak_table(args):
    for kind in ['float32'] + ['bf16','bf16, compile']*(args.device == 'cuda'):
        for row in PEAK_ROWS: peak_rows(args, *row, kind)

# -- fresh processes

def fresh(args, what, *row, **env):
    "What `what` of this script gives in a process of its own"
    cmd = [sys.executable, __file__, '--threads', str(args.threads), '--device', args.device, '--fresh', json.dumps([what, *row])]
    return json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **env}).stdout.splitlines()[-1])

def seconds(args, name, *row):
    "`(seconds, page faults)` a step"
    step = stepper(LEARNERS[name](*row), args)
    for _ in range(2): step()
    before = getrusage(RUSAGE_SELF).ru_minflt
    return median(step() for _ in range(5)), (getrusage(RUSAGE_SELF).ru_minflt - before)//5

def malloc_table(args):
    for row in (('tiny', 1000, 50, 32), ('small', 1000, 50, 4)):
        t = [[fresh(args, 'seconds', 'ours', *row, **env) for env in ({}, KEEP)[::(1,-1)[r%2]]][::(1,-1)[r%2]] for r in range(3)]
        r,(a,b) = spread([plain[0]/kept[0] for plain,kept in t]),([median(c) for c in zip(*col)] for col in zip(*t))
        write(args, 'malloc', dict(zip(('size','seq_len','ps','bs'), row), ms=1000*a[0], ms_kept=1000*b[0], faults=int(a[1]), faults_kept=int(b[1]), **r, turns=3))
        print(f'{row[0]:6}{row[1]:6} samples, bs {row[3]:3}: {1000*a[0]:.0f} ms and {int(a[1])} page faults, memory kept {1000*b[0]:.0f} ms and {int(b[1])}: '
              f'{r["ratio"]:.2f} times faster ({r["low"]:.2f} to {r["high"]:.2f})', flush=True)

def extra_memory(args, name, *row):
    "MB of a first step in this process, over what was there before it"
    step = stepper(LEARNERS[name](*row), args)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    if not Path('/proc/self/clear_refs').exists(): return float('nan')
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                       # forget the peak so far
    step()
    return resident('VmHWM') - before

def memory_table(args):
    for seq_len,bs in MEMORY_ROWS:
        mb = {n: fresh(args, 'extra_memory', n, 'small', seq_len, 50, bs) for n in ('ours','MVP, SDPA','MVP') if n != 'MVP' or seq_len <= HAND_WRITTEN_TO}
        for n,m in mb.items(): write(args, 'memory', dict(model=n, size='small', seq_len=seq_len, ps=50, tokens=n_tokens(seq_len, 50), bs=bs, mb=m))
        print(f'small {seq_len:6} samples, bs {bs:3}: ' + ', '.join(f'{n} {m:.0f} MB' for n,m in mb.items()), flush=True)

def length_table(args):
    names = 'ours','MVP, SDPA'
    steps = {(n,s): stepper(LEARNERS[n]('small', s, 50, 10_000//s), args) for s in LENGTHS for n in names}
    t = timed_turns(steps, args)
    for n,s in steps:
        r = spread([1000*r[n,s]/(10_000//s) for r in t])
        write(args, 'length', dict(model=n, size='small', seq_len=s, ps=50, tokens=n_tokens(s, 50), bs=10_000//s, ms=r['ratio'], low=r['low'], high=r['high'], turns=len(t)))
        print(f'small {s:6} samples, {n:10}: {r["ratio"]:8.0f} ms a record ({r["low"]:.0f} to {r["high"]:.0f})', flush=True)

TABLES = dict(mvp=mvp_table, stmem=stmem_table, peak=peak_table, malloc=malloc_table, length=length_table, memory=memory_table)

def processor():
    "The processor's name, empty where the system does not say"
    cpuinfo = Path('/proc/cpuinfo')
    return next((l.split(':',1)[1].strip() for l in cpuinfo.read_text().splitlines() if l.startswith('model name')), '') if cpuinfo.exists() else ''

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', nargs='+', choices=TABLES, default=list(TABLES))
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--seconds', type=float, default=20, help='for the turns of a row, of which there are between 3 and 9')
    p.add_argument('--device', choices=('cpu','cuda'), default='cpu')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix(''), help='folder of the csv files')
    p.add_argument('--fresh', help=argparse.SUPPRESS)
    args = p.parse_args()
    args.begun = set()
    torch.set_num_threads(args.threads)
    if args.fresh:
        what,*row = json.loads(args.fresh)
        print(json.dumps(dict(seconds=seconds, extra_memory=extra_memory)[what](args, *row))); sys.exit()
    args.out.mkdir(exist_ok=True, parents=True)
    device = torch.cuda.get_device_name() if args.device == 'cuda' else processor()
    args.machine = dict(device=device, threads=args.threads, torch=torch.__version__, capability=torch.backends.cpu.get_cpu_capability())
    for table in args.only:
        print(f'\n{table}: one step of pretraining, {args.device} ({device}), {args.threads} thread(s), torch {torch.__version__}, load {os.getloadavg()[0]:.1f}', flush=True)
        TABLES[table](args)
