"The identities of the method, one test each, over all read-outs where it makes sense"
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai.callback.core import Callback

from fastai_ecg_pma.aggregate import (PPA, Concat, FusedModel, Last, LastMean, Layer, OwnNorm, PlainNorm, ReadOut, SharedNorm, SignedStatic, Static,
                                      class_head, fused_width, linear_head, mix)
from fastai_ecg_pma.attend import AttentionPool, Attentive
from fastai_ecg_pma.gate import GATE_INPUTS, PMA, ClassPMA, LeadPMA, softmax, top_k
from fastai_ecg_pma.layers import LayerStack, mean_leads, mean_tokens
from fastai_ecg_pma.learner import make_vit, pma_learner, readout_learner
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse, patchify, random_mask
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.synth import synth_ptbxl
from fastai_ecg_pma.vit1d import ViT1d

BS, L, D, OUT, N_LEADS = 3, 3, 32, 4, 12

READOUTS = dict(
    last=Last, embeddings=partial(Layer, l=0), layer_2=partial(Layer, l=2), last_2=partial(LastMean, k=2), ppa=PPA, static=Static,
    static_last=partial(Static, start='last'), signed=SignedStatic, concat=Concat, pma=PMA, pma_all=partial(PMA, reads='all'),
    pma_top=partial(PMA, choose=partial(top_k, k=2, straight_through=True)), pma_ppa=partial(PMA, start='ppa'), pma_last=partial(PMA, start='last'),
    pma_fixed=partial(PMA, train_gate=False), class_pma=partial(ClassPMA, n_out=OUT), attentive=partial(Attentive, n_heads=4),
    attentive_last=partial(Attentive, n_heads=4, start='last'))
BY_LEAD = dict(lead_pma=LeadPMA, attentive_leads=partial(Attentive, n_heads=4, n_leads=N_LEADS))
ALL = {**READOUTS, **BY_LEAD}


@pytest.fixture(scope='module')
def enc():
    torch.manual_seed(0)
    return ViT1d(200, 25, d=D, n_layers=L, n_heads=1).eval().requires_grad_(False)

@pytest.fixture(scope='module')
def x(): return torch.randn(BS, N_LEADS, 200, generator=torch.Generator().manual_seed(1))

@pytest.fixture(scope='module')
def backbones(enc):
    "Without and with the lead axis"
    return LayerStack(enc), LayerStack(enc, pool=mean_leads)

@pytest.fixture(scope='module')
def stacks(backbones, x): return [b(x) for b in backbones]


def make_read_out(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    fuse = ALL[name](L, D)
    head = class_head if isinstance(fuse, ClassPMA) else linear_head
    return ReadOut(fuse, head(fused_width(fuse, N_LEADS if name in BY_LEAD else None), OUT), **kwargs).eval().requires_grad_(False)

def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize('F', [PMA, LeadPMA, partial(ClassPMA, n_out=OUT)], ids=['pma', 'lead', 'class'])
@pytest.mark.parametrize('reads', GATE_INPUTS)
@pytest.mark.parametrize('choose', [softmax, partial(softmax, temperature=.1), partial(top_k, k=L)], ids=['softmax', 'sharp', 'top_all'])
def test_ppa_is_pma_with_equal_logits(stacks, F, reads, choose):
    for h in stacks[F is LeadPMA:]:
        f = F(L, D, reads=reads, choose=choose).eval().requires_grad_(False)
        want = PPA(L, D)(h)
        if isinstance(f, ClassPMA): want = (want if want.ndim == 2 else want.mean(1))[:, None].expand(-1, OUT, -1)
        assert (f(h) - want).abs().max() > 1e-4
        last = [m for m in f.gate if isinstance(m, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.fill_(3.)
        close(f(h), want)


def make_sure(fuse, l):
    "Let `fuse` be sure of layer `l`, from the outside"
    want = torch.eye(L)[l-1]
    if isinstance(fuse, PMA):
        last = [m for m in fuse.gate if isinstance(m, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(((want - 1)*1e4).repeat(fuse.n_gates))
    elif isinstance(fuse, Static): fuse.scores.copy_((want - 1)*1e4)
    else: fuse.w.copy_(want)

@pytest.mark.parametrize('l', range(1, L+1))
@pytest.mark.parametrize('name', ['static', 'signed', 'pma', 'pma_all', 'pma_top', 'class_pma', 'lead_pma'])
@pytest.mark.parametrize('norm', [None, PlainNorm, SharedNorm, OwnNorm])
def test_one_hot_gate_is_that_layers_probe(enc, backbones, x, name, l, norm):
    layer_norm = norm and norm(L, D)
    if norm is OwnNorm: torch.nn.init.normal_(layer_norm.weight)
    m = FusedModel(backbones[name in BY_LEAD], make_read_out(name, layer_norm=layer_norm))
    make_sure(m.head.fuse, l)
    state = layer_norm(m.backbone(x))[:, l] if norm else m.backbone(x)[:, l]
    if name == 'class_pma': state = state[:, None].expand(-1, OUT, -1)
    probe = m.head.classifier(enc.norm(state).flatten(1))
    close(m(x), probe)
    if name not in ('class_pma', 'lead_pma'):
        close(FusedModel(m.backbone, ReadOut(Layer(L, D, l), m.head.classifier, layer_norm))(x), probe)
    w = m.weights(x)
    close(w, torch.eye(L)[l-1].view(1, L, *[1]*(w.ndim-2)).expand_as(w))


@pytest.mark.parametrize('n_layers', [1, 2])
def test_with_one_layer_ipastmem_is_stmem(n_layers, x):
    torch.manual_seed(0)
    enc = ViT1d(200, 25, d=D, n_layers=n_layers, n_heads=1)
    last = MAE(enc, d=32, n_layers=1, n_heads=1)
    every = MAE(deepcopy(enc), d=32, n_layers=1, n_heads=1, fuse=PPA)
    every.load_state_dict(last.state_dict())
    mask = random_mask((BS, N_LEADS, 8), generator=torch.Generator().manual_seed(2))
    preds = [m(x, mask) for m in (last, every)]
    for p in preds: masked_mse(p, patchify(x, 25), mask).backward()
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (last, every)]
    apart = [(preds[0] - preds[1]).abs().max(), (grads[0] - grads[1]).abs().max()]
    assert max(apart) < 1e-6 if n_layers == 1 else min(apart) > 1e-3


@pytest.mark.parametrize('name', [n for n in READOUTS if n not in ('concat', 'embeddings', 'attentive', 'attentive_last', 'class_pma')])
def test_mixing_commutes_with_pooling(enc, x, stacks, name):
    "Also of the tokens' mean in two steps, over patches and then over leads"
    fuse = make_read_out(name).fuse
    every = LayerStack(enc, pool=None)
    tokens = every(x)
    w = fuse.weights(stacks[0])
    mixed = mix(tokens[:, 1:], w)
    close(mean_tokens(*every.split(mixed)), fuse(stacks[0]))
    close(mean_leads(*every.split(mixed)), mix(stacks[1][:, 1:], w))
    close(fuse(stacks[1]).mean(1), fuse(stacks[0]))
    if name not in ('last', 'layer_2', 'static_last', 'pma_last'):      # what is not linear does not commute: a norm before the mean
        normed = mean_tokens(*every.split(mix(PlainNorm(L, D)(tokens)[:, 1:], w)))
        assert (normed - mix(PlainNorm(L, D)(stacks[0])[:, 1:], w)).abs().max() > 1e-3


@pytest.mark.parametrize('pool', [None, mean_tokens, mean_leads, AttentionPool(D, start=None), AttentionPool(D, by_lead=True)],
                         ids=['encoder', 'mean_tokens', 'mean_leads', 'attention', 'attention_by_lead'])
def test_separators_never_enter_the_pool(enc, backbones, x, pool):
    pooled = enc.pool if pool is None else lambda h: pool(*backbones[0].split(h))
    for h in enc.states(x):
        first = torch.arange(N_LEADS)*10                        # 8 patches between two separators
        separators = torch.cat([first, first + 9])
        assert h.shape[1] == 10*N_LEADS
        other = h.clone()
        other[:, separators] = torch.nan
        assert torch.equal(pooled(other), pooled(h))
        other = h.clone()
        other[:, 13] += torch.arange(D)                         # but a patch does
        assert (pooled(other) - pooled(h)).abs().max() > 1e-4


class Gradients(Callback):
    "Sums up, for each parameter of the head, how large its gradients were"
    order = 50
    def before_fit(self): self.sums = {}
    def before_step(self):
        for n, p in self.model.head.named_parameters(): self.sums[n] = self.sums.get(n, 0) + (0 if p.grad is None else p.grad.abs().sum().item())

@pytest.fixture(scope='module')
def dls(tmp_path_factory): return ptbxl_dls(synth_ptbxl(tmp_path_factory.mktemp('ecgs'), n=60), bs=16)

def frozen_learner(dls, name, pool, norm):
    torch.manual_seed(0)
    enc, n_out = make_vit(dls, ps=100, d=D, n_layers=L, n_heads=1), len(dls.vocab)
    fuse = partial(ALL[name], n_out=n_out) if name == 'class_pma' else ALL[name]
    width = fused_width(fuse(L, D), N_LEADS if name in BY_LEAD else None)
    head = lambda _, n_out: (class_head if name == 'class_pma' else linear_head)(width, n_out)
    if name not in BY_LEAD: learn = pma_learner(dls, enc, fuse, head=head, cbs=Gradients())
    else: learn = readout_learner(dls, LayerStack(enc, pool=mean_leads), fuse, head=head, cbs=Gradients())
    if pool: learn.model.head.pool = pool
    if norm: learn.model.head.layer_norm = norm
    if pool or norm: learn.create_opt()
    learn.freeze()
    return learn

@pytest.mark.parametrize('name,pool,norm', [*[(n, None, None) for n in ALL], ('pma', AttentionPool(D), SharedNorm(L, D)),
                                            ('lead_pma', AttentionPool(D, by_lead=True), None), ('static', None, OwnNorm(L, D))])
def test_frozen_the_head_learns_and_the_backbone_is_bit_equal(dls, name, pool, norm):
    learn = frozen_learner(dls, name, pool, norm)
    model, before = learn.model, deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith('backbone.'))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    in_optimiser = {id(p) for ps in learn.opt.param_lists for p in ps}
    head = dict(model.head.named_parameters())
    assert {n for n, p in head.items() if id(p) not in in_optimiser} == set()
    assert {n for n in head if learn.gradients.sums[n] == 0} == set()
    assert {n for n in head if torch.equal(after[f'head.{n}'], before[f'head.{n}'])} == set()
    buffers = set(after) - {f'head.{n}' for n in head} - {k for k in after if k.startswith('backbone.')}
    assert all(torch.equal(after[k], before[k]) for k in buffers)
    assert any('gate' in k for k in buffers) == (name == 'pma_fixed')


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('pool', [False, True])
def test_one_encoder_state_loads_with_only_head_keys_new(enc, backbones, stacks, x, name, pool):
    backbone = deepcopy(backbones[name in BY_LEAD])
    for p in backbone.parameters(): torch.nn.init.normal_(p)
    assert (backbone(x) - stacks[name in BY_LEAD]).abs().max() > .1
    pool = AttentionPool(D, by_lead=name in BY_LEAD) if pool else None
    m = FusedModel(backbone, make_read_out(name, pool=pool))
    loaded = m.load_state_dict({f'backbone.encoder.{k}': v for k, v in enc.state_dict().items()}, strict=False)
    assert loaded.unexpected_keys == []
    assert set(loaded.missing_keys) == {f'head.{k}' for k in m.head.state_dict()}
    close(m.backbone(x), stacks[name in BY_LEAD], 0)


@pytest.mark.parametrize('seq_len,ps,n_tokens,n_visible', [(1000, 50, 264, 84), (2250, 75, 384, 108)])
def test_token_counts(seq_len, ps, n_tokens, n_visible):
    enc, x = ViT1d(seq_len, ps, d=D, n_layers=2, n_heads=1), torch.randn(2, N_LEADS, seq_len)
    mask = random_mask((2, N_LEADS, seq_len//ps), .75)
    assert [h.shape[1] for h in enc.states(x)] == [n_tokens]*3
    assert [h.shape[1] for h in enc.states(x, mask)] == [n_visible]*3
    assert MAE(enc, d=32, n_layers=1, n_heads=1).encode(x, mask).shape[1] == n_visible


SAFE = [('last', F) for F in (Static, SignedStatic, PMA, LeadPMA, partial(ClassPMA, n_out=OUT), Attentive, partial(Attentive, n_leads=N_LEADS))]
SAFE += [('ppa', F) for _, F in SAFE]

@pytest.mark.parametrize('start,F', SAFE, ids=[f'{s}-{getattr(F, "func", F).__name__}{"s" if getattr(F, "keywords", {}).get("n_leads") else ""}' for s, F in SAFE])
@pytest.mark.parametrize('norm', [None, PlainNorm])
def test_a_safe_start_is_the_baseline_at_epoch_0(enc, backbones, stacks, x, start, F, norm):
    torch.manual_seed(0)
    fuse, layer_norm = F(L, D, start=start), norm and norm(L, D)
    leads = isinstance(fuse, LeadPMA) or getattr(fuse, 'n_leads', 1) > 1
    wide = fused_width(fuse, N_LEADS if leads else None)
    classifier = class_head(wide, OUT) if isinstance(fuse, ClassPMA) else linear_head(wide, OUT)
    m, h = FusedModel(backbones[leads], ReadOut(fuse, classifier, layer_norm)), stacks[leads]
    m.head.train()
    if norm: h = norm(L, D)(h)
    z = dict(last=Last, ppa=PPA)[start](L, D)(h)
    if isinstance(fuse, Attentive) and leads: z = z.mean(1)
    if isinstance(fuse, ClassPMA): z = z[:, None].expand(-1, OUT, -1)
    baseline = classifier(enc.norm(z).flatten(1)).detach()
    close(m(x).detach(), baseline, 1e-6)
    opt = torch.optim.SGD(fuse.parameters(), lr=1.)
    m(x).square().sum().backward()
    opt.step()
    assert (m(x) - baseline).abs().max() > 1e-4
