"Laws of attributions, each method against a few lines written another way; and leads silenced as the preprocessing means it"
import warnings
from functools import partial

import numpy as np, pytest, torch
from sklearn.metrics import roc_auc_score
from torch import nn
from tsai.data.core import TSClassification, get_ts_dls
from tsai.data.preprocessing import TSStandardize
from tsai.learner import ts_learner
from tsai.models.PatchTST import PatchTST
from tsai.models.TSTPlus import TSTPlus

from fastai_ecg_pma.attribution import (IncompleteAttribution, attribute, drop_leads, gradient_input, integrated_gradients, occlusion, plot_drops, silence)
from fastai_ecg_pma.data import ecg_dls, wfdb_dls
from fastai_ecg_pma.learner import evaluate, pma_learner, predict_record
from fastai_ecg_pma.metrics import class_aurocs
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.synth import PTBXL_LEADS, simulate_ecg, write_record
from fastai_ecg_pma.vit1d import ViT1d

METHODS = dict(occlusion=partial(occlusion, size=1), occlusion_over=partial(occlusion, size=4, stride=1), gradient=gradient_input, integrated=integrated_gradients)
FULL = dict(rtol=1e-4, atol=1e-4)
def close(a, b, **kwargs): torch.testing.assert_close(a, b, **{**FULL, **kwargs})


class Smooth(nn.Module):
    "A net with a hidden layer that does not look at lead 1, with dropout and a batch norm"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(2*12, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Dropout(.5), nn.Linear(16, 3))
    def forward(self, x): return self.net(x[:,[0,2]])

@pytest.fixture
def model():
    torch.manual_seed(0)
    m = Smooth().double()
    m.net[3].running_mean.normal_()
    m.net[3].running_var.uniform_(.5, 2)
    return m.train()

@pytest.fixture
def x(): return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(1)).double()

def f(model, x, target):
    with torch.no_grad(): return model.eval()(x)[:, target]


@pytest.mark.parametrize('baseline', [0., .7, 'tensor'])
@pytest.mark.parametrize('name', ['occlusion', 'gradient', 'integrated'])
def test_linear_model_has_one_answer(name, baseline, x):
    w = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double()
    b = torch.randn(3, 12).double() if baseline == 'tensor' else baseline
    a, gap = METHODS[name](lambda x: torch.stack([x.sum((1, 2)), (x*w).sum((1, 2)) + 3], 1), x, 1, baseline=b)
    close(a, w*(x-b), atol=1e-9)
    close(gap, torch.zeros(5).double(), atol=1e-9)


def test_integrated_gradients_are_complete_and_converge(model, x):
    for target in range(3):
        gaps = [integrated_gradients(model, x, target, steps=n, tol=99)[1].abs().max() for n in (2, 4, 8, 32)]
        assert gaps[0] > 10*gaps[1] > 100*gaps[3] and gaps[3] < 1e-6
        a, gap = integrated_gradients(model, x, target, baseline=.3, steps=32)
        close(a.sum((1, 2)), f(model, x, target) - f(model, torch.full_like(x, .3), target), atol=1e-6)
        assert not torch.allclose(a, integrated_gradients(model, x, target)[0])              # the baseline matters


def test_integrated_gradients_are_the_mean_gradient_on_the_straight_way(model, x):
    "Against a plain Riemann sum"
    a, _ = integrated_gradients(model, x, 2, steps=64)
    model.eval()
    want, n = torch.zeros_like(x), 4000
    for i in range(n):
        z = (x*(i+.5)/n).requires_grad_()
        want += torch.autograd.grad(model(z)[:, 2].sum(), z)[0]/n
    close(a, want*x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('name', METHODS)
def test_an_ignored_lead_gets_nothing(name, model, x):
    a, _ = METHODS[name](model, x, 0)
    close(a[:, 1], torch.zeros(5, 12).double(), atol=1e-12)
    assert (a[:, [0, 2]].abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize('name', METHODS)
def test_equal_functions_get_equal_attributions(name, model, x):
    "The same function computed otherwise: the norm folded into the linear layers"
    m = model.net
    scale = m[3].weight/(m[3].running_var + m[3].eps).sqrt()
    def other(x):
        h = (x[:, [0, 2]].flatten(1) @ m[1].weight.T + m[1].bias)
        h = (2*torch.sigmoid(2*h) - 1 - m[3].running_mean)*scale + m[3].bias
        return torch.cat([h @ r[:, None] + b for r, b in zip(m[5].weight, m[5].bias)], 1)
    for i in range(2): close(METHODS[name](model, x, 1)[i], METHODS[name](other, x, 1)[i].detach(), atol=1e-8)


@pytest.mark.parametrize('size,stride', [(3, None), (3, 2), (5, 4), (12, None), (1, 1), (5, 5)])
def test_occlusion_is_the_slow_loop(size, stride, model, x):
    a, gap = occlusion(model, x, 1, size=size, stride=stride, baseline=.2, bs=7)
    starts = list(range(0, 12-size+1, stride or size))
    if starts[-1] != 12-size: starts.append(12-size)                          # flush with the end
    total, n = torch.zeros_like(x), torch.zeros(12).double()
    for s in starts:
        n[s:s+size] += 1
        for lead in range(3):
            z = x.clone()
            z[:, lead, s:s+size] = .2
            total[:, lead, s:s+size] += ((f(model, x, 1) - f(model, z, 1))/size)[:, None]
    close(a, total/n, atol=1e-9)
    close(gap, a.sum((1, 2)) - f(model, x, 1) + f(model, torch.full_like(x, .2), 1), atol=1e-9)


@pytest.mark.parametrize('name', METHODS)
def test_the_model_and_x_are_left_as_they_were(name, model, x):
    model.net[1].requires_grad_(False)
    model.net[4].eval()
    state, flags, rng, was = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], torch.get_rng_state(), x.clone()
    a, _ = METHODS[name](model, x, 0)
    assert [m.training for m in model.modules()] == flags and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False]*2 + [True]*4
    assert all(p.grad is None for p in model.parameters()) and torch.equal(x, was) and not x.requires_grad and not a.requires_grad
    with pytest.raises(ValueError, match='target=3'): METHODS[name](model, x, 3)
    assert [m.training for m in model.modules()] == flags
    with torch.no_grad(): close(METHODS[name](model, x, 0)[0], a, atol=0, rtol=0)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('bs', [1, 3])
def test_alone_equals_in_a_batch(name, bs, model, x):
    all_of_it, gap = METHODS[name](model, x, 0)
    a, g = METHODS[name](model, x[2:3], 0, bs=bs)
    close(a, all_of_it[2:3], atol=1e-9)
    close(g, gap[2:3], atol=1e-9)


@pytest.mark.parametrize('name', METHODS)
def test_what_was_not_recorded_gets_nothing(name, x):
    "NaN goes to the model as it is, on the whole way, and a model may write into what it is given"
    x[0, 1, 4:] = torch.nan
    seen = []
    def model(x):
        seen.append(x.isnan().any((1, 2)).all())
        x[x.isnan()] = 5.
        return x.pow(2).sum((1, 2))[:, None]
    a, gap = METHODS[name](model, x[:1], 0)
    assert all(seen) and a.isfinite().all() and x[0, 1, 4:].isnan().all()
    close(a[0, 1, 4:], torch.zeros(8).double()) if name != 'occlusion_over' else close(a[0, 1, 8:], torch.zeros(4).double())
    if name in ('occlusion', 'integrated'): close(gap, torch.zeros(1).double(), atol=1e-3)


def test_a_gap_is_warned_of_and_more_steps_close_it(model, x):
    sharp = lambda z: (40*(z.sum((1, 2)) - z[:, 0, 0] - 1)).tanh()[:, None]
    x = x*0 + .1
    with pytest.warns(IncompleteAttribution, match='take more steps than 4, steps=16'): integrated_gradients(sharp, x, 0, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        integrated_gradients(sharp, x, 0, steps=400)
        integrated_gradients(sharp, x, 0, steps=4, tol=99)
    assert not issubclass(IncompleteAttribution, (UserWarning, FutureWarning))


def test_refused(model, x):
    refused = [(dict(x=x[0]), r'\[bs, n_leads, seq_len\]'), (dict(x=x.long()), 'floats'), (dict(baseline=torch.zeros(4, 12)), 'baseline is of shape'),
               (dict(baseline=float('nan')), 'finite'), (dict(target=-1), 'target=-1')]
    for kw, says in refused:
        for m in METHODS.values():
            with pytest.raises(ValueError, match=says): m(**{**dict(model=model, x=x, target=0), **kw})
    with pytest.raises(ValueError, match='steps=0'): integrated_gradients(model, x, 0, steps=0)
    for size, stride in ((0, None), (13, None), (3, 4), (3, 0.5)):
        with pytest.raises(ValueError, match='choose 1 <= stride <= size <= 12'): occlusion(model, x, 0, size, stride)
    with pytest.raises(ValueError, match='no gradient'): gradient_input(lambda x: model(x).detach(), x, 0)
    with pytest.raises(ValueError, match='not finite'): gradient_input(lambda x: x.abs().sum((1, 2)).sqrt()[:, None], x*0, 0, baseline=1.)


# --- learners

PREP = Preprocess(leads=['I', 'II', 'V1', 'V5'], seq_len=200, stride=100, missing='nan')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Records of one to four windows, two patients' worth of labels"
    d, rng = tmp_path_factory.mktemp('records'), np.random.default_rng(0)
    for i in range(24): write_record(simulate_ecg(['PVC' if i % 3 == 0 else 'NORM'], seconds=2+i % 4, rng=i), d/f'r{i:02d}', 100)
    return d

def make_dls(folder, prep=PREP, one_class=False, **kwargs):
    import pandas as pd
    t = pd.DataFrame(dict(path=[f'r{i:02d}' for i in range(24)], pvc=[int(i % 3 == 0) for i in range(24)], late=[int(i % 2) for i in range(24)], valid=[i % 24 > 9 for i in range(24)]))
    t['kind'] = np.where(t.pvc, 'ectopic', np.where(t.late, 'late', 'early'))
    return wfdb_dls(folder, t, label_cols='kind' if one_class else ['pvc', 'late'], prep=prep, bs=8, **kwargs)

def fit(learn, lr=3e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr)
    return learn

@pytest.fixture(scope='module')
def dls(folder): return make_dls(folder)

@pytest.fixture(scope='module')
def learn(dls): return fit(pma_learner(dls, ViT1d(200, 25, d=32, n_layers=2, n_heads=1, leads=PREP.leads), pretrained=False, seed=0))

TST = dict(d_model=16, n_layers=2, n_heads=2, d_ff=16)
BACKBONES = dict(plain=lambda: PatchTST(4, 2, 200, **TST, patch_len=25, stride=25, revin=False),
                 vit=lambda: ViT1d(200, 25, d=32, n_layers=2, n_heads=1, leads=PREP.leads), tst=lambda: TSTPlus(4, 2, 200, **TST, max_seq_len=50),
                 patch=lambda: PatchTST(4, 2, 200, **TST, patch_len=25, stride=25))

@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('frozen', [True, False])
def test_every_backbone_frozen_or_not(name, frozen, dls):
    torch.manual_seed(0)
    l = pma_learner(dls, BACKBONES[name](), pretrained=frozen, seed=0)
    fit(l)
    l.model.train()
    flags, state = [(m.training, [p.requires_grad for p in m.parameters()]) for m in l.model.modules()], {k: v.clone() for k, v in l.model.state_dict().items()}
    for p in l.model.parameters(): p.grad = None
    for method, kw in ((integrated_gradients, dict(steps=256)), (gradient_input, {}), (None, {})):
        a = attribute(l, 3, 'pvc', method, **kw)
        assert a.values.shape == (4, 200) and np.isfinite(a.values).all() and np.abs(a.values).sum() > 0
        if method is integrated_gradients and name != 'patch': assert abs(a.gap) <= .05*abs(a.change) + 1e-3*np.abs(a.values).sum()
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in l.model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in l.model.state_dict().items()) and all(p.grad is None for p in l.model.parameters())


def test_a_gradient_held_back_is_warned_of(dls):
    "PatchTST detaches the mean and SD that it norms each record by: no number of steps makes its gradients complete"
    l = pma_learner(dls, BACKBONES['patch'](), pretrained=False, seed=0)
    fit(l)
    with pytest.warns(IncompleteAttribution, match='holds a part of its gradient back'): attribute(l, 3, 'pvc', integrated_gradients, steps=1000)


def test_a_row_is_the_window_of_its_file(dls, learn):
    rows = np.asarray(dls.valid.dataset.split_idxs)
    for row in (0, 5, 11):
        r = rows[row]
        a = attribute(learn, row, 'pvc', gradient_input)
        b = attribute(learn, dls.paths[r], 'pvc', gradient_input, window=dls.starts[r]//100)
        np.testing.assert_allclose(a.values, b.values, atol=1e-5)
        mean, sd, unit = b.scale
        raw = Preprocess(PREP.leads, seq_len=200, stride=100, standardize='none').windows(dls.paths[r])[dls.starts[r]//100]
        np.testing.assert_allclose(b.x*sd + mean, raw, atol=1e-4)
        assert unit == a.scale[2] == 'mV' and a.leads == list(PREP.leads)
    assert any(dls.starts[rows[:12]] > 0)
    with pytest.raises(ValueError, match='window=9'): attribute(learn, dls.paths[0], window=9)


def test_targets(dls, learn):
    a = attribute(learn, 0)
    logits = [attribute(learn, 0, c).logit for c in ('pvc', 'late')]
    assert a.logit == max(logits) and attribute(learn, 0, 1).target == 'late'
    for odd in ('nothing', 2, -1):
        with pytest.raises(ValueError, match='none of pvc, late'): attribute(learn, 0, odd)
    for odd in (-1, 10**6):
        with pytest.raises(ValueError, match='has rows 0 to'): attribute(learn, odd)


def test_occlusion_hides_with_what_stands_for_an_absent_lead(folder):
    l = pma_learner(make_dls(folder, Preprocess(**{**PREP.as_dict(), 'fill': .5})), BACKBONES['vit'](), pretrained=False, seed=0)
    a, b, c = (attribute(l, 0, 0, partial(occlusion, size=20), **kw).values for kw in ({}, dict(baseline=.5), dict(baseline=0.)))
    assert (a == b).all() and not np.allclose(a, c)
    np.testing.assert_array_equal(a, attribute(l, 0, 0).values)                # 0.2 s


def test_the_drawing_shows_what_there_is(dls, learn):
    a = attribute(learn, 0, 'pvc')
    fig = a.plot(['V5', 'I'], smooth=0)
    assert [ax.get_ylabel() for ax in fig.axes] == ['V5', 'I']
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), a.x[3]*a.scale[1][3] + a.scale[0][3], atol=1e-6)
    im = fig.axes[0].images[0].get_array()[0]
    strong = np.abs(a.values[3]) > .1*np.abs(a.values).max()
    assert ((im[:, 0] > im[:, 2]) == (a.values[3] > 0))[strong].all() and strong.any()
    np.testing.assert_allclose(im[:, 3], .75*np.abs(a.values[3])/np.abs(a.values).max(), atol=1e-6)
    assert 'smoothed' not in fig.axes[-1].get_xlabel() and 'smoothed for display' in a.plot().axes[-1].get_xlabel()
    assert a.by_lead['V5'] == pytest.approx(a.values[3].sum()) and len(a.plot().axes) == 4
    with pytest.raises(ValueError, match="'V9' is none of"): a.plot(['V9'])


@pytest.mark.parametrize('prep', [PREP, Preprocess(**{**PREP.as_dict(), 'standardize': 'record'}), Preprocess(**{**PREP.as_dict(), 'standardize': 'none', 'fill': .3}),
                                  Preprocess(**{**PREP.as_dict(), 'standardize': 'record', 'fill': None})])
def test_silenced_is_not_recorded(prep, tmp_path):
    "Against records that really lack the lead"
    ecg = simulate_ecg(seconds=4, rng=3)
    write_record(ecg, tmp_path/'all', 100)
    keep = [i for i, l in enumerate(PTBXL_LEADS) if l != 'V1']
    write_record(ecg[keep], tmp_path/'some', 100, [PTBXL_LEADS[i] for i in keep])
    x, want = prep.windows(tmp_path/'all'), prep.windows(tmp_path/'some')
    was = x.copy()
    np.testing.assert_allclose(silence(x, [2], prep), want, atol=1e-4)
    np.testing.assert_array_equal(x, was)
    np.testing.assert_allclose(silence(want, [2], prep), want, atol=1e-4)        # once is enough
    np.testing.assert_allclose(silence(silence(x, [0], prep), [2], prep), silence(x, [0, 2], prep), atol=1e-4)


@pytest.mark.parametrize('one_class', [False, True])
def test_drops_are_scored_by_record(folder, one_class):
    d = make_dls(folder, one_class=one_class)
    l = fit(pma_learner(d, BACKBONES['vit'](), pretrained=False, seed=0))
    drops = drop_leads(l, bs=7)
    assert np.nanmean(drops.loc['none'].to_numpy()) == pytest.approx(evaluate(l, n=0).point, abs=1e-6)
    paths = list(dict.fromkeys(d.paths[i] for i in d.valid.dataset.split_idxs))
    table = d.table.drop_duplicates('path').set_index('path').loc[[p.name for p in paths]]
    for gone in ([], ['II'], ['V1']):                                         # by hand: one file after the other
        p = []
        for path in paths:
            w = torch.from_numpy(PREP.windows(path))
            for lead in gone: w[:, PREP.leads.index(lead)] = 0
            with torch.no_grad(): y = l.model.eval()(w)
            p.append((y.softmax(1) if one_class else y.sigmoid()).mean(0).numpy())
        for j, c in enumerate(d.vocab):
            got = drops.loc[('alone', gone[0]) if gone else ('none', ''), c]
            y = table.kind == c if one_class else table[c]
            assert got == pytest.approx(roc_auc_score(y, np.array(p)[:, j]), abs=1e-6)


def test_order_and_shape_of_the_curve(learn):
    drops = drop_leads(learn)
    assert list(drops.index.get_level_values(0)) == ['none', *['alone']*4, *['cumulative']*3] and list(drops.columns) == ['pvc', 'late']
    alone, more = drops.loc['alone'].mean(axis=1), drops.loc['cumulative']
    assert list(more.index) == list(alone.sort_values(ascending=False, kind='stable').index[:3])
    assert drops.loc[('cumulative', more.index[0])].tolist() == drops.loc[('alone', more.index[0])].tolist()
    x, y = (np.asarray(v) for v in learn.dls.valid.dataset[:])
    gone = [PREP.leads.index(l) for l in more.index[:2]]
    x[:, gone] = 0
    with torch.no_grad(): p = learn.model.eval()(torch.from_numpy(x)).sigmoid().numpy()
    record = learn.dls.record[np.asarray(learn.dls.valid.dataset.split_idxs)]
    q, t = (np.stack([v[record == r].mean(0) for r in np.unique(record)]) for v in (p, y))
    np.testing.assert_allclose(more.iloc[1], class_aurocs(q, t)[0], atol=1e-6)
    assert len(plot_drops(drops)[1].lines) == 2


class OnlyLead(nn.Module):
    "Looks at the size of one lead alone"
    def __init__(self, lead): super().__init__(); self.lead, self.w = lead, nn.Parameter(torch.ones(1))
    def forward(self, x): return self.w*torch.stack([x[:, self.lead].abs().mean(-1), -x[:, self.lead].abs().mean(-1)], 1)

@pytest.mark.parametrize('lead', [0, 2, 3])
def test_the_lead_that_counts_is_found(lead):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 90)
    X = rng.normal(size=(90, 4, 50)).astype('f')
    X[:, lead] *= 1 + y[:, None]
    d = ecg_dls(X, np.c_[y, 1-y], ['big', 'small'], np.arange(90) >= 30, Preprocess(leads=PREP.leads, seq_len=50), bs=16)
    l = pma_learner(d, ViT1d(50, 25, d=32, n_layers=2, n_heads=1, leads=PREP.leads))
    l.model = OnlyLead(lead)
    drops = drop_leads(l)
    name = PREP.leads[lead]
    assert (drops.loc['none'] > .99).all(axis=None) and drops.loc[('alone', name)].tolist() == [.5, .5]
    assert (drops.loc['alone'].drop(name) > .99).all(axis=None) and name not in drops.loc['cumulative'].index       # the last one left
    assert (drops.loc['cumulative'] > .99).all(axis=None)
    assert attribute(l, 0, 'big').by_lead.abs().idxmax() == name


def test_a_plain_tsai_learner_and_its_batch_transform():
    rng = np.random.default_rng(0)
    X, y = rng.normal(3, 5, (60, 4, 60)).astype('f'), np.array(list('ab'*30))
    d = get_ts_dls(X, y, splits=(list(range(40)), list(range(40, 60))), tfms=[None, TSClassification()], bs=10, batch_tfms=TSStandardize(by_sample=True, by_var=True))
    l = ts_learner(d, TSTPlus, arch_config=TST)
    a = attribute(l, 2, 'b', integrated_gradients)
    assert a.scale[2] == 'SD' and a.leads == [0, 1, 2, 3] and a.target == 'b'
    np.testing.assert_allclose(a.x, (X[42] - X[42].mean(1, keepdims=True))/X[42].std(1, keepdims=True, ddof=1), atol=1e-4)
    a.plot([0, 3])
    drops = drop_leads(l)
    assert list(drops.columns) == ['a', 'b'] and np.isfinite(drops.to_numpy()).all()
    assert drops['a'].to_numpy() == pytest.approx(drops['b'].to_numpy())      # softmax of two


def test_absent_samples_marked_by_nan(folder):
    prep = Preprocess(**{**PREP.as_dict(), 'fill': None})
    d = make_dls(folder, prep)
    l = pma_learner(d, TSTPlus(4, 2, 200, **TST), pretrained=False, seed=0)
    assert np.isfinite(drop_leads(l).to_numpy()).all()
    x = torch.from_numpy(silence(d.valid_ds[:2][0], [1], prep))
    a, gap = integrated_gradients(l.model, x, 0, tol=99)
    assert a.isfinite().all() and not a[:, 1].any() and a[:, 0].any()


def test_not_scored(folder):
    X, y = np.random.default_rng(0).normal(size=(9, 2, 50)).astype('f'), np.zeros((9, 1))
    for n, says in ((1, 'hold one lead, I'), (2, 'none can be scored')):
        d = ecg_dls(X[:, :n], y, ['never'], np.arange(9) > 4, Preprocess(leads=['I', 'II'][:n], seq_len=50))
        with pytest.raises(ValueError, match=says): drop_leads(pma_learner(d, ViT1d(50, 25, d=32, n_layers=2, n_heads=1, leads=['I', 'II'][:n])))
    with pytest.raises(ValueError, match='random crops'): drop_leads(pma_learner(make_dls(folder, random_crop=True), BACKBONES['vit']()), 0)


def test_the_learner_goes_on_as_if_nothing_had_been(dls):
    def run(look):
        l = pma_learner(dls, BACKBONES['vit'](), pretrained=False, seed=4)
        fit(l)
        if look: attribute(l, 0, 'pvc', integrated_gradients, tol=99); attribute(l, 1, ds_idx=0); drop_leads(l, 0)
        fit(l)
        return [p.detach().clone() for p in l.model.parameters()], l.recorder.values, predict_record(l, dls.paths[0])
    torch.manual_seed(1)
    a = run(False)
    torch.manual_seed(1)
    b = run(True)
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0])) and a[1] == b[1] and a[2].equals(b[2])
