"Laws of the geometry of layers, and each measure against a few lines written another way"
import warnings

warnings.filterwarnings('ignore', '.*torch.jit.script')
from copy import deepcopy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import Ridge

from fastai_ecg_pma.aggregate import mix
from fastai_ecg_pma.attention import attention_maps, attention_stats, attention_weights, describe_attention
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.geometry import (cka_matrix, cosine_to_last, effective_rank, layer_cka, layer_geometry, linear_cka, record_batches, token_norm, token_uniformity,
                                     update_coefficients, update_norm)
from fastai_ecg_pma.hidden import hidden_r2, visible_means
from fastai_ecg_pma.masking import fixed, patchify, per_lead, recorded, same_times, standardize_patches, whole_leads
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.vit1d import ViT1d, visible_tokens

LEADS3, PS, N = ('I', 'II', 'V1'), 20, 6                       # patches a lead


def make(n=60, gaps=False, seed=0):
    "Records in which leads share a signal, and `dls` of them: every third is for validation"
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3, PS*N)) + 2*rng.normal(size=(n, 1, PS*N))
    prep = Preprocess(leads=LEADS3, seq_len=PS*N, standardize='none')
    if gaps: X[3:9, 1] = 0; X[10:20, :, 60:] = 0
    return ecg_dls(X.astype(np.float32), None, None, np.arange(n) % 3 == 0, prep, bs=8)


@pytest.fixture(scope='module')
def dls(): return make()


@pytest.fixture(scope='module')
def enc():
    "Weights shaken: fresh ones give almost equal attention, and a wrong scale would pass"
    torch.manual_seed(0)
    m = ViT1d(PS*N, PS, d=32, n_layers=3, n_heads=2, leads=LEADS3).eval().requires_grad_(False)
    for p in m.parameters(): p.add_(.1*torch.randn_like(p))
    return m


def of(dls, split): return torch.as_tensor(np.asarray(dls[split].dataset[:][0]))


# ---- CKA and rank

def hsic(a, b, debiased):
    "By the formula of Song et al. (2012), or the biased one, from the Gram matrices"
    k, l, n = a @ a.T, b @ b.T, len(a)
    if not debiased: h = np.eye(n) - 1/n; return np.trace(k @ h @ l @ h)
    np.fill_diagonal(k, 0); np.fill_diagonal(l, 0)
    return np.trace(k @ l) + k.sum()*l.sum()/((n-1)*(n-2)) - 2/(n-2)*(k.sum(0) @ l.sum(1))


@pytest.mark.parametrize('debiased', [True, False])
@pytest.mark.parametrize('n,d1,d2', [(40, 6, 9), (20, 30, 50), (20, 6, 50), (4, 3, 3)])
def test_cka(n, d1, d2, debiased):
    rng = np.random.default_rng(n + d2)
    a = rng.normal(size=(n, d1)) + 3
    b = np.tanh(a @ rng.normal(size=(d1, d2))) - 1
    want = hsic(a, b, debiased)/(hsic(a, a, debiased)*hsic(b, b, debiased))**.5
    assert_allclose(linear_cka(a, b, debiased), want, atol=1e-9)
    assert_allclose(linear_cka(b, a, debiased), want, atol=1e-9)
    turn = np.linalg.qr(rng.normal(size=(d2, d2)))[0]
    assert_allclose(linear_cka(a, -5*b @ turn + rng.normal(size=d2), debiased), want, atol=1e-9)
    assert_allclose(linear_cka(np.r_[a[1:], a[:1]], np.r_[b[1:], b[:1]], debiased), want, atol=1e-9)
    assert abs(linear_cka(a, b[::-1].copy(), debiased)) < 1 + 1e-9


def test_unrelated_features_have_none_in_common():
    "Over many draws the debiased measure is 0; the classical one is far from it"
    rng = np.random.default_rng(0)
    draws = np.array([[linear_cka(*z, debiased) for debiased in (True, False)] for z in rng.normal(size=(60, 2, 32, 24))])
    assert abs(draws[:, 0].mean()) < .02 and draws[:, 1].min() > .3


def test_cka_matrix():
    rng = np.random.default_rng(1)
    H, G = rng.normal(size=(30, 3, 5)), rng.normal(size=(30, 2, 8))
    assert_allclose(cka_matrix(H), [[linear_cka(H[:, i], H[:, j]) for j in range(3)] for i in range(3)])
    assert_allclose(cka_matrix(H, G, False), [[linear_cka(H[:, i], G[:, j], False) for j in range(2)] for i in range(3)])
    H[:, 1] = 7.1 + 1e-8*H[:, 1]                               # what differs by rounding is the same
    assert np.isnan(cka_matrix(H)).tolist() == [[False, True, False], [True]*3, [False, True, False]]


def test_rank():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(30, 8))*np.arange(1, 9)
    s = np.sqrt(np.linalg.eigvalsh(np.cov(a.T, bias=True))); p = s/s.sum()
    assert_allclose(effective_rank(a), np.exp(-(p*np.log(p)).sum()), rtol=1e-6)
    assert_allclose(effective_rank(a.T[:4].T @ np.linalg.qr(rng.normal(size=(4, 4)))[0]*3 - 9), effective_rank(a[:, :4]), rtol=1e-6)
    assert effective_rank(a[:5]) < 4 + 1e-9 and effective_rank(a) < 8             # 4 differences among 5 records
    assert effective_rank(a, center=False) != effective_rank(a)


# ---- tokens

def test_token_measures():
    torch.manual_seed(0)
    h, scale = torch.randn(2, 4, 7, 5), torch.rand(2, 4, 7, 1) + .1
    for f in (token_uniformity, cosine_to_last): assert_allclose(f(h*scale), f(h), atol=1e-6)              # of directions
    for f in (token_norm, update_norm): assert_allclose(f(3*h), 3*f(h), rtol=1e-5)
    for f in (token_norm, update_norm, token_uniformity, cosine_to_last):
        assert_allclose(f(h[:, :, torch.randperm(7)]), f(h), atol=1e-6)
        assert_allclose(f(h[1:]), f(h)[1:], atol=1e-6)
    assert_allclose(token_norm(h), (h**2).sum(-1).sqrt().mean(-1), rtol=1e-5)
    assert_allclose(update_norm(h)[:, 1:], [[np.mean([np.linalg.norm(t - s) for s,t in zip(r[l-1], r[l])]) for l in (1, 2, 3)] for r in h.numpy()], rtol=1e-5)
    u = torch.nn.functional.normalize(h, dim=-1)
    assert_allclose(cosine_to_last(h), torch.einsum('bltd,btd->bl', u, u[:, 3])/7, atol=1e-6)
    assert not update_norm(h[:, :1].expand_as(h))[:, 1:].any()
    assert_allclose(token_uniformity(h), ((u @ u.mT).sum((-1, -2)) - 7)/42, atol=1e-6)
    assert (token_uniformity(h[..., :1].abs()) > 1 - 1e-6).all()


def test_layer_geometry(dls, enc):
    was, rng = {k: v.clone() for k,v in enc.state_dict().items()}, torch.get_rng_state()
    df = layer_geometry(enc, dls)
    with torch.no_grad(): h = torch.stack([enc.patches(s).flatten(1, 2) for s in enc.states(of(dls, 1))], 1)
    for c,f in dict(norm=token_norm, update=update_norm, uniformity=token_uniformity, cos_last=cosine_to_last).items(): assert_allclose(df[c], f(h).mean(0), rtol=1e-4)
    pooled = h.mean(2)
    assert_allclose(df['rank'], [effective_rank(pooled[:, l]) for l in range(4)], rtol=1e-4)
    assert_allclose(df.cka_last, cka_matrix(pooled)[-1], atol=1e-5); assert_allclose(df.cka_before[1:], np.diag(cka_matrix(pooled), 1), atol=1e-5)
    assert_allclose(layer_geometry(enc, dls, bs=3), df, rtol=1e-4)
    assert all(torch.equal(v, enc.state_dict()[k]) for k,v in was.items()) and torch.equal(torch.get_rng_state(), rng)
    assert not enc.training and not any(p.requires_grad for p in enc.parameters())
    assert list(layer_geometry(enc, dls, measures=dict(mine=lambda h: h[..., 0].mean(-1))).columns) == ['mine', 'rank', 'cka_before', 'cka_last']


def test_layer_cka_of_two_encoders(dls, enc):
    torch.manual_seed(1)
    other = ViT1d(PS*N, PS, d=16, n_layers=2, n_heads=1, leads=LEADS3)
    c = layer_cka(enc, dls, other)
    assert c.shape == (4, 3)
    with torch.no_grad(): a, b = ([m.patches(s).mean((1, 2)) for s in m.states(of(dls, 1))] for m in (enc, other))
    assert_allclose(c, [[linear_cka(u, v) for v in b] for u in a], atol=1e-5)


def test_records(dls):
    rows, xs = zip(*record_batches(dls, 0, 9, 4))
    assert [len(r) for r in rows] == [4, 4, 1]
    rows = np.concatenate(rows)
    assert rows[0] == 0 and rows[-1] == 39 and set(np.diff(rows)) <= {4, 5}
    assert torch.equal(torch.cat(xs), of(dls, 0)[rows])
    with pytest.raises(ValueError, match='n=0'): next(record_batches(dls, 0, 0, 4))


# ---- attention

@pytest.mark.parametrize('way', [None, per_lead, 'ragged'])
def test_attention_is_what_the_block_does(dls, enc, way):
    x = of(dls, 1)[:4]
    mask = None if way is None else per_lead(fixed(range(4)), torch.ones(4, 3, N, dtype=torch.bool), .5)
    if way == 'ragged': mask[0, 1] = True; mask[2, :, 3:] = True
    seen = None if mask is None else visible_tokens(mask)[1]
    got = []
    hooks = [b.attn.register_forward_hook(lambda m, a, out: got.append((m, a[0], out))) for b in enc.blocks]
    list(enc.states(x, mask))
    for h in hooks: h.remove()
    maps = list(attention_maps(enc, x, mask))
    assert len(maps) == len(got) == 3
    for w,(attn,z,out) in zip(maps, got):
        v = attn.qkv(z).unflatten(-1, (3, 2, 64))[:, :, 2].transpose(1, 2)
        assert_allclose(attn.out((w @ v).transpose(1, 2).flatten(2)), out, atol=1e-5)
        assert_allclose(w.sum(-1), np.ones(w.shape[:3]), atol=1e-5)
        assert_allclose(attention_weights(attn, z, seen), w, atol=1e-6)
        if seen is not None: assert not w.transpose(1, 3)[~seen].any()
    assert max(float(w.std(-1).max()) for w in maps) > .01                        # not all alike


def test_what_heads_look_at():
    "Attention made by hand, 3 leads of 6 patches"
    T, one = 3*(N+2), torch.eye(3*(N+2))
    lead, place = torch.arange(T)//(N+2), torch.arange(T) % (N+2)
    def d(to): return {k: v.item() for k,v in describe_attention(one[to][None, None], 3, .5).items()}
    me = torch.arange(T)
    assert d(me) == dict(entropy=0, entropy_share=0, seconds=0, own_lead=1, other_leads=0, separators=0)
    assert d((me + N+2) % T)['other_leads'] == 1 and d(lead*(N+2))['separators'] == 1
    after = torch.where((place > 0) & (place < N), me+1, me)                      # the next patch; the last looks at itself
    assert_allclose(d(after)['seconds'], .5*(N-1)/N)
    half = describe_attention((.75*one + .25*one[after.new_full((T,), 1)])[None, None], 3)    # a quarter goes to the first patch of the first lead
    assert_allclose([half[k].item() for k in ('own_lead', 'other_leads')], [.75 + .25/3, .25*2/3], rtol=1e-5)
    own = (.75*18 + .25*6)/18
    assert_allclose(half['seconds'].item(), .25*sum(range(6))/18/own, rtol=1e-5)
    e = -(.75*np.log(.75) + .25*np.log(.25))
    assert_allclose(half['entropy'].item(), e*17/18, rtol=1e-5); assert_allclose(half['entropy_share'].item(), e*17/18/np.log(T), rtol=1e-5)
    noise = torch.rand(1, 1, T, T); w = one[None, None].clone(); w[:, :, (place == 0) | (place == N+1)] = noise[:, :, (place == 0) | (place == N+1)]
    assert describe_attention(w, 3)['separators'].item() == 0                     # what separators look at does not count
    with pytest.raises(ValueError, match='5 leads'): describe_attention(w, 5)


def test_attention_stats(dls, enc):
    s = attention_stats(enc, dls, bs=7)
    assert list(s.index) == [(l, h) for l in (1, 2, 3) for h in (0, 1)]
    for l,w in enumerate(attention_maps(enc, of(dls, 1)), 1):
        for k,v in describe_attention(w, 3, PS/100).items(): assert_allclose(s.loc[l, k], v.mean(0), rtol=1e-4)
    uniform = ViT1d(PS*N, PS, d=32, n_layers=2, n_heads=1, leads=LEADS3)
    for b in uniform.blocks: torch.nn.init.zeros_(b.attn.qkv.weight)
    u = attention_stats(uniform, dls)
    assert_allclose([u[k].iloc[0] for k in u.attrs['uniform']], list(u.attrs['uniform'].values()), rtol=1e-4)


# ---- hidden patches

def rows_by_hand(enc, x, mask, was, l):
    "For each lead: features, patches and records, one patch at a time"
    X, y, rec = ([[] for _ in LEADS3] for _ in range(3))
    for i in range(len(x)):
        vis = [(c, j) for c in range(3) for j in range(N+2) if j in (0, N+1) or not mask[i, c, j-1]]
        h = dict(zip(vis, list(enc.states(x[i:i+1], mask[i:i+1]))[l][0].numpy()))
        for c in range(3):
            for j in range(N):
                if not mask[i, c, j] or not was[i, c, j]: continue
                time, lead = [v for (a, b),v in h.items() if b == j+1], [v for (a, b),v in h.items() if a == c and 0 < b < N+1]
                X[c].append(np.r_[np.mean(time, 0) if time else np.zeros(enc.d), np.mean(lead, 0) if lead else np.zeros(enc.d)])
                y[c].append(x[i, c, j*PS:(j+1)*PS].numpy()); rec[c].append(i)
    return [[np.array(v[c]) for v in (X, y, rec)] for c in range(3)]


@pytest.mark.parametrize('way', [per_lead, whole_leads, same_times])
@pytest.mark.parametrize('standardize', [False, True])
def test_hidden_r2_by_hand(enc, way, standardize):
    dls = make(n=90, gaps=True)                                                   # what was not recorded is hidden, and no target
    df = hidden_r2(enc, dls, mask=way, ratio=.5, seed=4, standardize=standardize, probe=lambda record: Ridge(3.), bs=7)
    std = lambda y: standardize_patches(torch.as_tensor(y)).numpy() if standardize else y
    for l in (0, 2):
        parts = []
        for i in (0, 1):
            x = of(dls, i); was = recorded(x, PS)
            assert not was.all()
            parts.append(rows_by_hand(enc, x, way(fixed(range(len(x)), 4+i), was, .5), was, l))
        sse = sst = 0
        for c,((X0,y0,_),(X1,y1,_)) in enumerate(zip(*parts)):
            e = ((Ridge(3.).fit(X0, std(y0)).predict(X1) - std(y1))**2).sum(); t = ((std(y0).mean(0) - std(y1))**2).sum()
            assert_allclose(df.loc[l, LEADS3[c]], 1 - e/t, atol=1e-3)
            sse += e; sst += t
        assert_allclose(df.R2[l], 1 - sse/sst, atol=1e-3)


def test_hidden_samples_do_not_reach_the_features(dls, enc):
    x = of(dls, 0)[:8]
    for way in (per_lead, whole_leads, same_times):
        mask = way(fixed(range(8)), torch.ones(8, 3, N, dtype=torch.bool), .5)
        other = (patchify(x, PS) + 50*mask[..., None]).flatten(-2)
        for a,b in zip(visible_means(enc, x, mask), visible_means(enc, other, mask)): assert torch.equal(a, b)
        assert not torch.equal(visible_means(enc, x + .1, mask)[0], visible_means(enc, x*torch.linspace(0, 1, PS*N), mask)[0])


def test_hidden_r2_of_what_is_known():
    "Copies of a lead can be read off, noise cannot; and the ridge takes no note of the validation records"
    rng = np.random.default_rng(3)
    torch.manual_seed(0)
    enc = ViT1d(PS*N, PS, d=64, n_layers=2, n_heads=1, leads=LEADS3)
    def of_signal(X): return ecg_dls(X.astype(np.float32), None, None, np.arange(len(X)) % 3 == 0, Preprocess(leads=LEADS3, seq_len=PS*N, standardize='none'))
    z = rng.normal(size=(200, 3, PS*N))
    copies = hidden_r2(enc, of_signal(z[:, :1].repeat(3, 1)), mask=whole_leads, ratio=.5)
    assert copies.R2[0] > .85 and hidden_r2(enc, of_signal(z)).R2.abs().max() < .02
    few = hidden_r2(enc, of_signal(z[:9]))                                       # 6 training records
    assert few.isna().all().all()
    assert hidden_r2(enc, of_signal(z[:24])).notna().all().all()


# ---- convex mixes

def test_coefficients():
    torch.manual_seed(0)
    h, w = torch.randn(5, 1+4, 3, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    c = update_coefficients(w)
    assert_allclose(c, [[sum(row[k:]) for k in range(4)] for row in w.tolist()])
    assert_allclose(mix(h[:, 1:], w), c[:, :1]*h[:, 0] + mix(h.diff(dim=1), c), atol=1e-12)
    convex = update_coefficients(w.softmax(-1))
    assert (convex.diff(dim=-1) <= 0).all() and ((convex >= 0) & (convex <= 1 + 1e-12)).all()
    assert_allclose(convex[:, 0], np.ones(5))
    assert (c.diff(dim=-1) > 0).any()
    assert_allclose(update_coefficients(np.eye(4)), np.tril(np.ones((4, 4))))      # layer l holds the updates up to l


def test_the_callers_encoder_is_as_it_was(dls, enc):
    m = deepcopy(enc).train().requires_grad_(True)
    for f in (attention_stats, layer_cka): f(m, dls)
    hidden_r2(m, dls, n=24)
    assert m.training and all(p.requires_grad and p.grad is None for p in m.parameters()) and not m.blocks[0]._forward_hooks


def test_nothing_is_dropped(dls):
    m = ViT1d(PS*N, PS, d=32, n_layers=2, n_heads=1, leads=LEADS3, drop=.5).train()
    assert layer_geometry(m, dls).equals(layer_geometry(m, dls))
    assert attention_stats(m, dls).equals(attention_stats(m, dls))
