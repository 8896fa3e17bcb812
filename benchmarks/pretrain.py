"""Speed of one pretraining step: against tsai's MVP, against ST-MEM written plainly, against the processor's matmul peak; its memory; long records

    OMP_NUM_THREADS=1 python benchmarks/pretrain.py [--threads 1] [--turns 5] [--only peak mvp stmem memory length] [--size small] [--device cpu] [--out benchmarks/results]

A step is everything between batch and next batch: the mask is drawn, forward, loss, backward, optimizer (fastai's Adam, as in `pretrain_learner`; the same for all),
gradients to zero. Records are 12 leads of noise, three quarters of the patches hidden, decoder of ST-MEM (256 wide, 4 layers). Float32, on a GPU also bfloat16, eager and compiled.

mvp     Ours against tsai's masked pretraining, on TSiTPlus of the same width, depth, heads (of 64 units) and MLP. MVP has no patches and hides single time steps, so it
        cannot pretrain a model of patch tokens at all. It gets what it can work on: a record of as many time steps as ours has tokens (visible, hidden and separators; 264
        for 1,000 samples in patches of 50), one token a step. So both see the same number of tokens, of the same width, in as many layers; ours encodes the
        visible ones and has a decoder besides, MVP encodes all. Mask, loss and head are MVP's own code. 'SDPA': the same with tsai's attention replaced by `use_sdpa`.
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
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse, patchify, per_lead, recorded, uniform
from fastai_ecg_pma.sdpa import use_sdpa
from fastai_ecg_pma.vit1d import VIT_SIZES, Attention, ViT1d
from gate import now, turns
from sdpa import Path as _, resident

N_LEADS,RATIO = 12,0.75
PARTS = 'peak', 'mvp', 'stmem', 'memory', 'length'
SQUARES = 512, 1024, 2048                                               # of matmuls on a CPU; on a GPU 4 times as large

# ours
def ours(mae, x):
    "Loss of a step: what `MaskPatches` makes of a batch, the model, `masked_mse`"
    was = recorded(x, mae.ps)
    hidden = per_lead(uniform(len(x), x.device), was, RATIO)
    return masked_mse(mae(x, hidden), patchify(x, mae.ps), hidden & was)

def make(size, seq_len, ps, device): return MAE(ViT1d(seq_len, ps, **VIT_SIZES[size])).to(device)

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
        start = now(device)
        with cast(): l = loss()
        l.backward()
        opt.step(); opt.zero_grad()
        return now(device) - start
    return step

def records(bs, seq_len, device): return torch.randn(bs, N_LEADS, seq_len, device=device)

def both(a, b, n):
    "`n` turns of two steps after one that is not counted: median ms of each, and how many times faster `a` is: median, lowest, highest"
    for s in (a,b): s()
    t = turns(dict(a=a, b=b), n)
    r = [i['b']/i['a'] for i in t]
    return dict(ms=1000*median(i['a'] for i in t), other_ms=1000*median(i['b'] for i in t), times=median(r), low=min(r), high=max(r))

# the work
def work(size, seq_len, ps, bs):
    "FLOPs of the forward, by hand: 2 for a weight and a token, 2 for a score and 2 for its use for each unit of a head and pair of tokens"
    d,L,heads = VIT_SIZES[size].values()
    n = seq_len//ps
    visible,full,inner = N_LEADS*(int(n*(1-RATIO))+2),N_LEADS*(n+2),64*heads
    def blocks(d, inner, n_layers, n_tokens, n_seen): return n_layers*n_tokens*(2*(4*d*inner + 8*d*d) + 4*n_seen*inner)
    return bs*(2*N_LEADS*n*ps*d + blocks(d, inner, L, visible, visible) + 2*visible*d*256 + blocks(256, 256, 4, full, n+2) + 2*N_LEADS*n*256*ps)

def counted(mae, x):
    with FlopCounterMode(display=False) as f: ours(mae, x)
    return f.get_total_flops()

def square(n, device, dtype):
    a,b = (torch.randn(n, n, device=device, dtype=dtype) for _ in 'ab')
    def best():
        times = []
        for _ in range(max(3, 2048//n)):
            start = now(device); a @ b; times.append(now(device) - start)
        return 2*n**3/min(times)
    return best
