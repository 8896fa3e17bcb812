"Probabilities that mean what they say: known distortions are undone, order stays, nothing is scored on its own fit, and no file of a stranger does harm"
import copy
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax
from scipy.stats import binomtest
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import confusion_matrix, roc_auc_score

from fastai_ecg_pma.calibrate import (FEW, MAX_POINTS, T_RANGE, Calibration, FewPositives, NotCalibrated, calibration_table, cross_calibrated,
                                      fit_calibration, log_odds, patient_folds, plot_reliability, reliability, wilson)
from fastai_ecg_pma.metrics import class_aurocs, class_briers, class_eces, f1_thresholds
from fastai_ecg_pma.thresholds import NoThreshold, Thresholds, choose_thresholds, threshold_table

METHODS = 'temperature', 'platt', 'isotonic'
many = settings(max_examples=120, deadline=None, derandomize=True)


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return f(*args, **kw)


def truth(n, seed=0, labels=3):
    "Log-odds that are right, and labels drawn by them"
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, labels))*2 - np.arange(labels)
    return z, (rng.random(z.shape) < expit(z)).astype(int)


@st.composite
def cases(draw, n=40):
    "Few records, ties, ends, labels that nobody or everybody has"
    rng, n, k = np.random.default_rng(draw(st.integers(0, 2**32-1))), draw(st.integers(2, n)), draw(st.integers(1, 3))
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))
    p = rng.integers(0, levels+1, (n, k))/levels if draw(st.booleans()) else expit(rng.normal(size=(n, k))*draw(st.sampled_from([.1, 3, 40])))
    return p.astype(draw(st.sampled_from([np.float32, np.float64]))), (rng.random((n, k)) < rng.choice([0, .1, .5, 1], k)).astype(int)


# ---- known answers

@pytest.mark.parametrize('seed', range(3))
def test_known_distortions_are_undone(seed):
    z, y = truth(20_000, seed)
    for scale, shift in ((1, 0), (2, 1), (.5, -2)):
        s = scale*z + shift
        cal = fit_calibration(expit(s), y)
        for i in range(3):
            w = expit(z[:,i])*(1 - expit(z[:,i])); d = np.stack([s[:,i], np.ones(len(s))])
            error = np.sqrt(np.diag(np.linalg.inv((d*w) @ d.T)))                          # of a logistic regression
            assert (np.abs(np.array([cal.a[i] - 1/scale, cal.b[i] + shift/scale]))/error < 4).all()
            assert error[0] < .05/scale
    for scale in (.07, .5, 1, 3): assert fit_calibration(expit(scale*z), y, method='temperature').T == pytest.approx(scale, rel=.05)
    flat = .15*z; y = (np.random.default_rng(seed).random(z.shape) < expit(flat)).astype(int)      # 15 times these are log-odds that float32 can still tell from 1
    assert fit_calibration(expit(15*flat), y, method='temperature').T == pytest.approx(15, rel=.12)


def test_calibrated_is_better_elsewhere():
    z, y = truth(6000); p = expit(3*z + 1).astype(np.float32)
    fit, test = slice(0, 3000), slice(3000, None)
    for m in METHODS:
        q = fit_calibration(p[fit], y[fit], method=m)(p[test])
        assert (class_briers(q, y[test]) < class_briers(p[test], y[test])).all() and class_eces(q, y[test]).mean() < .7*class_eces(p[test], y[test]).mean()


@many
@given(cases())
def test_temperature_is_the_best_one(case):
    p, y = case
    T = quiet(fit_calibration, p, y, method='temperature').T
    z = log_odds(p)
    def nll(T): return (np.logaddexp(0, z/T) - y*z/T).mean()
    if y.min() == y.max(): assert T == 1
    else:
        best = minimize_scalar(lambda u: nll(np.exp(u)), bounds=np.log(T_RANGE), method='bounded', options=dict(xatol=1e-10))
        assert nll(T) <= min(best.fun, nll(1)) + 1e-9


def test_temperature_of_one_class():
    rng = np.random.default_rng(0)
    for scale in (.4, 1, 3):
        u = rng.normal(size=(5000, 4)); y = np.eye(4, dtype=int)[(u + rng.gumbel(size=u.shape)).argmax(1)]
        p = softmax(scale*u, 1)
        cal = fit_calibration(p, y, method='temperature', one_class=True)
        best = minimize_scalar(lambda t: -(y*log_softmax(np.log(p)/t, 1)).sum(1).mean(), bounds=(.05, 20), method='bounded', options=dict(xatol=1e-10)).x
        assert cal.T == pytest.approx(best, rel=1e-5) and cal.T == pytest.approx(scale, rel=.1)
        assert_allclose(cal(p).sum(1), 1, atol=1e-12)
        assert_array_equal(cal(p).argsort(1), p.argsort(1))
    assert fit_calibration(p, y, method='temperature').T != cal.T                            # another likelihood
    sure = np.eye(4)[[0, 1, 2, 3]]
    assert_allclose(Calibration('temperature', tuple('abcd'), T=3., one_class=True)(sure).sum(1), 1, atol=1e-12)
    with pytest.raises(ValueError, match='record 1 sum to 1.2'): cal(np.array([[1, 0, 0, 0], [.9, .3, 0, 0]]))
    with pytest.raises(ValueError, match='record 0 has 2 classes'): fit_calibration(sure, 1 - (sure + np.roll(sure, 1, 1)).astype(int), method='temperature', one_class=True)
    for m in ('platt', 'isotonic'):
        with pytest.raises(ValueError, match="use method='temperature'"): fit_calibration(p, y, method=m, one_class=True)


@many
@given(cases())
def test_platt_minimises_its_likelihood(case):
    p, y = case
    cal = quiet(fit_calibration, p, y)
    for i in range(y.shape[1]):
        t, s = y[:,i], log_odds(p[:,i])
        if t.min() == t.max(): assert (cal.a[i], cal.b[i]) == (1, 0); continue
        n, k = len(t), t.sum()
        soft = np.where(t == 1, (k+1)/(k+2), 1/(n-k+2))
        def nll(ab): return np.mean(np.logaddexp(0, ab[0]*s + ab[1]) - soft*(ab[0]*s + ab[1]))
        starts = [minimize(nll, start, bounds=[(0, None), (None, None)], options=dict(ftol=1e-15, gtol=1e-9, maxiter=500)).fun for start in ([0, logit(soft.mean())], [1, 0], [.05, 0])]
        assert nll([cal.a[i], cal.b[i]]) <= min(starts) + 1e-7                               # with a slope that is not negative
        assert cal.a[i] >= 0
        if s.std() > .1: assert nll([cal.a[i]*1.01 + .01, cal.b[i]]) > nll([cal.a[i], cal.b[i]])


@many
@given(cases(300), st.integers(0, 2**32-1))
def test_isotonic_is_scikit_learns(case, seed):
    p, y = case
    p = p.astype(np.float64)
    cal = quiet(fit_calibration, p, y, method='isotonic')
    fresh = np.random.default_rng(seed).random((200, p.shape[1])); fresh[:2] = [[0], [1]]; fresh[2:2+len(p)] = p[:198]
    for i, q in enumerate(cal(fresh).T):
        if y[:,i].min() == y[:,i].max(): assert_array_equal(q, fresh[:,i]); continue
        theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds='clip').fit(p[:,i], y[:,i]).predict(fresh[:,i])
        assert_allclose(q, theirs, rtol=0, atol=3e-16)


# ---- laws

@many
@given(cases())
def test_order_and_range(case):
    p, y = case
    grid = np.sort(np.r_[np.linspace(0, 1, 400), p.ravel().astype(np.float64), 1e-300, 1e-45, 1-1e-12])[:,None].repeat(y.shape[1], 1)
    for m in METHODS:
        cal = quiet(fit_calibration, p, y, method=m)
        q = cal(p)
        assert q.dtype == np.float64 and (q >= 0).all() and (q <= 1).all()
        assert np.diff(cal(grid), axis=0).min() >= (0 if m == 'isotonic' else -1e-15)
        assert Calibration.from_dict(json.loads(json.dumps(cal.as_dict(), allow_nan=False))) == cal
        assert_array_equal(Calibration.from_dict(json.loads(json.dumps(cal.as_dict())))(grid), cal(grid))


@pytest.mark.parametrize('m', ['temperature', 'platt'])
def test_auroc_stays(m):
    z, y = truth(3000); p = expit(2.5*z + 1).astype(np.float32)
    assert_allclose(class_aurocs(fit_calibration(p[:500], y[:500], method=m)(p), y), class_aurocs(p, y), atol=1e-12)


def test_float32_ends():
    ends = np.array([0, 1e-37, 6e-8, np.nextafter(np.float32(1), np.float32(0)), 1], np.float32)
    z = log_odds(ends)
    assert np.isfinite(z).all() and (np.diff(z) > 0).all() and z[-1] < 18
    for m in METHODS:
        cal = quiet(fit_calibration, ends[:,None], [[0], [1], [0], [1], [1]], method=m)
        assert np.isfinite(cal(ends[:,None])).all()


def said(f, *args, **kw):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        out = f(*args, **kw)
    return out, [(x.category, str(x.message).split(':')[0]) for x in w]


def test_what_cannot_be_calibrated_is_said():
    z, y = truth(2000); p = expit(z)
    y[:,1] = 0
    y[:,2] = np.random.default_rng(0).random(2000) < expit(-z[:,2])
    for m in ('platt', 'isotonic'):
        cal, w = said(fit_calibration, p, y, ['SR', 'AF', 'PVC'], m)
        assert w == [(NotCalibrated, 'AF'), (NotCalibrated, 'PVC')]
        assert_allclose(cal(p)[:,1], p[:,1], atol=1e-15)
        assert np.ptp(cal(p)[:,2]) == 0 and cal(p)[0,2] == pytest.approx(y[:,2].mean(), abs=2e-3)
        assert roc_auc_score(y[:,0], cal(p)[:,0]) > .8
    few = np.zeros((2000, 2), int)
    few[np.argsort(-z[:,0])[:2*FEW:2], 0] = 1; few[np.argsort(-z[:,1])[:2*FEW-2:2], 1] = 1      # FEW positives, and one less
    assert few.sum(0).tolist() == [FEW, FEW-1]
    assert said(fit_calibration, p[:,:2], few, ['a', 'b'], 'isotonic')[1] == [(FewPositives, 'b')] and said(fit_calibration, p[:,:2], few)[1] == []
    assert said(fit_calibration, 1-p[:,:2], 1-few, ['a', 'b'], 'isotonic')[1] == [(FewPositives, 'b')]          # few negatives
    assert said(fit_calibration, p, 0*y, list('abc'), 'temperature')[1] == [(NotCalibrated, 'a, b, c')]
    assert said(fit_calibration, p, (z > 0).astype(int), method='temperature')[0].T == T_RANGE[0]
    cal, w = said(fit_calibration, p, (z < 0).astype(int), method='temperature')
    assert cal.T == T_RANGE[1] and w == [(NotCalibrated, '0, 1, 2')]


def test_data_is_checked():
    z, y = truth(50); p = expit(z)
    for args, message in (((z*9, y), 'is no probability'), ((p, y[:9]), 'scores are'), ((p, y*2), 'targets hold 2'), ((np.where(p == p[3], np.nan, p), y), 'record 3 are not finite'), ((p, y, ['a']), '1 names for 3'),
                          ((p, y, ['a', 'b', 'a']), 'twice'), ((p, y, None, 'spline'), "'spline'"), ((p[:0], y[:0]), 'nothing to fit')):
        with pytest.raises(ValueError, match=message): fit_calibration(*args)
    cal = fit_calibration(p, y, list('abc'))
    for bad, message in ((p[:,:2], r'\[n_records, 3\]'), (p[0], 'must be'), (p + 1, 'no probability'), (np.where(p == p[0], np.nan, p), 'nan is no')):
        with pytest.raises(ValueError, match=message): cal(bad)
    assert cal(p[:0]).shape == (0, 3)


# ---- other patients

@many
@given(st.integers(2, 60), st.integers(0, 2**32-1), st.integers(2, 6))
def test_patients_are_never_split(n, seed, folds):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(n//2, 1), n).astype(rng.choice(['int', 'str'])); y = (rng.random((n, 3)) < [.5, .1, 0]).astype(int)
    if (k := len(set(patients))) < folds:
        with pytest.raises(ValueError, match=f'{folds} folds of {k} patients'): patient_folds(y, patients, folds)
        return
    fold = patient_folds(y, patients, folds, seed % 100)
    each = {p: set(fold[patients == p]) for p in set(patients)}
    assert all(len(v) == 1 for v in each.values())
    sizes = np.bincount([v.copy().pop() for v in each.values()], minlength=folds)
    assert np.ptp(sizes) <= 1 and len(sizes) == folds
    has = [v for p, v in each.items() if y[patients == p, 1].any()]
    if len(has) > 1 and len(has) <= len([1 for p in each if y[patients == p, 0].any()]): assert len(set.union(*has)) > 1        # the rarest label is in two folds at least
    turn = rng.permutation(n)
    assert_array_equal(patient_folds(y[turn], patients[turn], folds, seed % 100), fold[turn])


def test_records_have_no_part_in_their_own_calibration():
    z, y = truth(400); p, patients = expit(2*z), np.arange(400)//2
    fold = patient_folds(y, patients, 5, seed=3)
    for m in METHODS:
        got = quiet(cross_calibrated, p, y, patients, m, seed=3)
        for k in range(5): assert_array_equal(got[fold == k], quiet(fit_calibration, p[fold != k], y[fold != k], method=m)(p[fold == k]))
    assert (cross_calibrated(p, y, patients, seed=4) != cross_calibrated(p, y, patients, seed=3)).any()
    one = np.eye(3, dtype=int)[(z + np.random.default_rng(0).gumbel(size=z.shape)).argmax(1)]
    assert_allclose(cross_calibrated(softmax(z, 1), one, patients, 'temperature', one_class=True).sum(1), 1, atol=1e-12)
    rare = np.zeros((400, 1), int); rare[0] = 1
    assert said(cross_calibrated, p[:,:1], rare)[1] == [(NotCalibrated, '0')]                  # once, not for each fold


def test_table():
    z, y = truth(600); p, patients = expit(3*z), np.arange(600)//3
    y[:,2] = 0
    cal = quiet(fit_calibration, p, y, list('abc'), 'isotonic')
    t = calibration_table(p, y, cal, patients, seed=2, bins=10)
    crossed = quiet(cross_calibrated, p, y, patients, 'isotonic', seed=2)
    for col, (f, q) in dict(ece=(class_eces, p), ece_after=(class_eces, cal(p)), ece_cross=(class_eces, crossed), brier=(class_briers, p), brier_after=(class_briers, cal(p)), brier_cross=(class_briers, crossed)).items():
        want = f(q, y, **(dict(bins=10) if f is class_eces else {}))[0]
        assert_allclose(t[col][:3], want, atol=1e-15); assert t[col]['macro'] == pytest.approx(want[:2].mean())
    assert t.ece_after['a'] < 1e-12 < .01 < t.ece_cross['a']                                  # its own records flatter
    assert_allclose(t.auroc[:2], class_aurocs(p, y)[0,:2]); assert np.isnan(t.auroc['c']) and t.n_pos.tolist() == [*y.sum(0), y.sum()]
    assert not [c for c in calibration_table(p, y, cal, folds=0) if c.endswith('cross')]


# ---- pictures

@many
@given(cases(200), st.sampled_from([3, 15]))
def test_bins_are_those_of_ece(case, bins):
    p, y = case
    r = reliability(p[:,0], y[:,0], bins)
    assert (r.n*(r.probability - r.share).abs()).sum()/len(p) == pytest.approx(class_eces(p, y, bins=bins)[0,0], abs=1e-9)
    assert r.n.sum() == len(p) and ((r.low <= r.share + 1e-12) & (r.share <= r.high + 1e-12)).all()
    for row in r.itertuples(): assert_allclose((row.low, row.high), binomtest(round(row.share*row.n), row.n).proportion_ci(method='wilson'), atol=1e-9)


def test_plot_shows_before_and_after():
    z, y = truth(900); p = expit(3*z)
    cal = fit_calibration(p, y, list('abc'))
    for given_, label, column in ((cal, 'b', [1]), (cal(p), 1, [1]), (cal, None, [0, 1, 2])):
        axs = plot_reliability(p, y, given_, label)
        for line, q in zip(axs[0].containers, (p, cal(p)), strict=True):
            r = reliability(q[:,column].ravel(), y[:,column].ravel())
            assert_allclose(line[0].get_xydata(), r[['probability', 'share']], atol=1e-12)
    assert len(plot_reliability(p, y)[0].containers) == 1


# ---- thresholds

TARGETS = st.sampled_from([('sensitivity', .01), ('sensitivity', .7), ('sensitivity', .9), ('sensitivity', 1), ('specificity', .01), ('specificity', .7), ('specificity', .95), ('specificity', 1), ('f1', True)])


@many
@given(cases(), TARGETS)
def test_threshold_is_the_best_of_all(case, target):
    p, y = case
    kind, want = target
    table, w = said(choose_thresholds, p, y, **{kind: want})
    gone = [i for i in range(y.shape[1]) if y[:,i].min() == y[:,i].max()]
    assert w == ([(NoThreshold, ', '.join(map(str, gone)))] if gone else [])
    for i, at in enumerate(table.threshold):
        s, t = p[:,i].astype(np.float64), y[:,i] == 1
        if i in gone: assert at == np.inf; continue
        tries = [(c, s >= c) for c in [*np.unique(s), np.inf]]
        f1 = [2*(yes & t).sum()/(yes.sum() + t.sum()) for _, yes in tries]
        yes = dict(sensitivity=lambda: [yes for c, yes in tries if (yes & t).sum() >= want*t.sum() - 1e-9][-1],
                   specificity=lambda: [yes for c, yes in tries if (~yes & ~t).sum() >= want*(~t).sum() - 1e-9][0],
                   f1=lambda: tries[max(range(len(tries)), key=lambda j: (f1[j], j))][1])[kind]()
        assert_array_equal(s >= at, yes)
        low, high = s[~yes].max(initial=0), s[yes].min(initial=1)
        assert low <= at <= high or at == np.inf and low == 1
        if high - low > 1e-6 and at < np.inf: assert at == pytest.approx((low + high)/2)       # halfway: rounding flips nothing
    if kind == 'f1': assert_array_equal(p >= table.threshold.to_numpy(), p >= f1_thresholds(p, y))


@many
@given(cases(), st.sampled_from([.95, .5]))
def test_threshold_table(case, level):
    p, y = case
    at = np.random.default_rng(len(p)).choice([0, .3, .5, 1, np.inf], y.shape[1])
    t = threshold_table(p, y, at, level=level)
    for i, row in t.iterrows():
        (tn, fp), (fn, tp) = confusion_matrix(y[:,i], p[:,i] >= at[i], labels=[0, 1])
        assert (row.n_pos, row.n_neg) == (tp+fn, tn+fp) and row.f1 == pytest.approx(2*tp/max(2*tp+fp+fn, 1))
        for name, k, n in (('sensitivity', tp, tp+fn), ('specificity', tn, tn+fp), ('ppv', tp, tp+fp), ('npv', tn, tn+fn)):
            got = row[[name, f'{name}_low', f'{name}_high']].to_numpy(float)
            if n: assert_allclose(got, (k/n, *binomtest(int(k), int(n)).proportion_ci(level, 'wilson')), atol=1e-12)
            else: assert np.isnan(got).all()


def test_targets_are_checked():
    p, y = np.full((4, 1), .5), np.array([[0], [1], [0], [1]])
    for kw, message in (({}, 'no target'), (dict(f1=False), 'no target'), (dict(sensitivity=.9, specificity=.9), 'sensitivity and specificity: give one'), (dict(sensitivity=.9, f1=True), 'sensitivity and f1: give one'),
                        (dict(sensitivity=0), 'sensitivity is 0'), (dict(specificity=1.1), 'specificity is 1.1'), (dict(sensitivity=float('nan')), 'sensitivity is nan')):
        with pytest.raises(ValueError, match=message): choose_thresholds(p, y, **kw)
    assert choose_thresholds(p, y, ['AF'], specificity=.5).attrs['rule'] == 'specificity >= 0.5'
    assert choose_thresholds(np.ones((4, 1)), y, specificity=1.).threshold[0] == np.inf and choose_thresholds(p, y, specificity=1.).threshold[0] == .75


@pytest.mark.parametrize('low', [.3, np.nextafter(.3, 1)])
def test_threshold_parts_neighbouring_floats(low):
    p = np.array([[low], [np.nextafter(low, 1)]])                                            # nothing is between them: halfway is rounded to one of them
    assert (p >= choose_thresholds(p, [[0], [1]], sensitivity=1.).threshold[0]).tolist() == [[False], [True]]


def test_equally_good_f1_takes_the_highest_threshold():
    p, y = np.array([[.9], [.5], [.4], [.3]]), np.array([[1], [0], [0], [1]])                # 2/3 with the first, and with all
    assert choose_thresholds(p, y, f1=True).threshold[0] == pytest.approx(.7)


def test_wilson():
    k, n = np.array([[0, 3, 7], [0, 1, 100]]), np.array([[5, 9, 7], [0, 1, 5000]])
    low, high = wilson(k, n, .9)
    for i in np.ndindex(k.shape):
        if n[i]: assert_allclose((low[i], high[i]), binomtest(k[i], n[i]).proportion_ci(.9, 'wilson'), atol=1e-14)
        else: assert np.isnan([low[i], high[i]]).all()
    assert (low[k == 0][:1] == 0).all() and high[0, 2] == 1


# ---- files of strangers

GOOD = [Calibration('temperature', ('AF', 'PVC'), T=1.7), Calibration('temperature', ('AF', 'PVC'), T=.3, one_class=True), Calibration('platt', ('AF', 'PVC'), a=(.5, 0.), b=(-.5, 1/3)),
        Calibration('isotonic', ('AF', 'PVC'), x=((0., .1, .7), (.5,)), y=((.1, .1, 1.), (.2,))), Thresholds(('AF', 'PVC'), (.3, np.inf), 'sensitivity >= 0.9')]
BAD = [None, True, 'AF', '', 1, 0, -1, 2, -.5, .5, 1.5, float('nan'), float('inf'), -float('inf'), 10**400, 1e-320, 1e308, -1e308, [], [1.], [[]], [[0., 1.]], [[0., 1.], [0., 1.]], {}, {'a': 1}, ['AF', 'AF'], ['AF', 'B', 'C'], ['A'*201, 'B'], [None, 'x'],
       [[0.]*(MAX_POINTS+1)]*2, [[1., 0.], [0., 1.]], [[0., 0.], [0., 1.]], [[0., 2.], [0., 1.]], 'platt', 'isotonic', 'temperature', object(), (1., 2.), b'x', 1j]


def places(d):
    "Paths of everything that is in nested dictionaries and lists"
    for k, v in (d.items() if isinstance(d, dict) else enumerate(d)):
        yield (k,)
        if isinstance(v, (dict, list)): yield from ((k, *p) for p in places(v))


def mutated(d, rng):
    d = copy.deepcopy(d)
    for _ in range(rng.integers(1, 3)):
        path = (every := list(places(d)))[rng.integers(len(every))]
        inside = d
        for k in path[:-1]: inside = inside[k]
        kind, bad = rng.integers(4), copy.deepcopy(BAD[rng.integers(len(BAD))])
        if kind == 0: del inside[path[-1]]
        elif kind == 1 and isinstance(inside, dict): inside[['T', 'a', 'b', 'x', 'y', 'one_class', 'at', 'names', 7, 'new'][rng.integers(10)]] = bad
        elif kind == 1: inside.append(bad)
        else: inside[path[-1]] = bad
        if not d: break
    return d


@pytest.mark.parametrize('good', GOOD, ids=lambda g: f"{type(g).__name__} {getattr(g, 'method', '')}")
def test_strange_files_are_refused_or_work(good):
    rng, grid, refused, taken = np.random.default_rng(0), np.sort(np.r_[np.linspace(0, 1, 60), 1e-9, 1-1e-9])[:,None]*[1, 1], 0, 0
    for _ in range(600):
        d = mutated(good.as_dict(), rng)
        try: new = type(good).from_dict(d)
        except ValueError as e: refused += 1; assert 5 < len(str(e)) < 500; continue
        taken += 1
        assert type(good).from_dict(json.loads(json.dumps(new.as_dict(), allow_nan=False))) == new
        n = len(new.names)
        p = grid[:,:1].repeat(n, 1)
        if getattr(new, 'one_class', False): p = p/np.maximum(p.sum(1, keepdims=True), 1e-9); p[0] = np.eye(n)[0]
        out = new(p)
        assert out.shape == p.shape and ((out >= 0) & (out <= 1)).all()
        if not getattr(new, 'one_class', False): assert np.diff(out.astype(float), axis=0).min() >= -1e-15
    assert refused > 300 and taken > 5
    assert type(good).from_dict(good.as_dict()) == good
    for other in ([], None, 'x', 3, [('method', 'platt')]):
        with pytest.raises(ValueError, match='a dictionary is expected'): type(good).from_dict(other)


@pytest.mark.parametrize('change,message', [
    (dict(method='isotonic', x=[[.5, .5]], y=[[0., .1]]), 'must rise in x'), (dict(method='isotonic', x=[[0., 1.]], y=[[1., 0.]]), 'may not fall in y'), (dict(method='isotonic', x=[[0., 1.]], y=[[1.]]), '2 x and 1 y'),
    (dict(method='isotonic', x=[[0., 1.1]], y=[[0., 1.]]), 'outside of 0 to 1'), (dict(method='isotonic', x=[[0.]*(MAX_POINTS+1)], y=[[0.]]), f'x has {MAX_POINTS+1} entries: expected 1 to {MAX_POINTS}'), (dict(method='isotonic', x=[[]], y=[[]]), 'x has 0 entries'),
    (dict(method='platt', a=[True], b=[0.]), 'a holds True'), (dict(method='platt', a=['1'], b=[0.]), "a holds '1'"), (dict(method='platt', a=[1.], b=[float('nan')]), 'b holds nan'), (dict(method='platt', a=[-.1], b=[0.]), 'a is -0.1'),
    (dict(method='platt', a=[1., 1.], b=[0.]), 'a has 2 entries: expected 1$'), (dict(method='platt', a=[1.], b=[0.], T=1.), 'T is 1.0: platt takes a and b'), (dict(method='platt', a=[1.]), 'b is None'), (dict(method='platt', a=[1.], b=[0.], one_class=True), 'only with temperature'),
    (dict(method='temperature', T=0), 'T is 0'), (dict(method='temperature', T=-1.), 'T is -1'), (dict(method='temperature', T=10**400), 'T holds'), (dict(method='temperature', T=1., one_class=1), 'one_class is 1'), (dict(method='temperature', T=1., names=['AF', 'AF']), "'AF' is there twice"),
    (dict(method='temperature', T=1., names=[]), 'names has 0'), (dict(method='temperature', T=1., names='AF'), "names is 'AF'"), (dict(method='temperature', T=1., scale=2), "'scale' is no part of a calibration"), (dict(method=['platt']), r"method is \['platt'\]"), (dict(T=1.), 'method is missing')])
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message): Calibration.from_dict(dict(names=['AF']) | change)


def test_steep_points_stay_between_their_neighbours():
    cal = Calibration('isotonic', ('a',), x=((.3, float(np.nextafter(.3, 1)), .6),), y=((0., .4, .4),))
    p = np.array([.1, .3, np.nextafter(.3, 1), .45, .9])[:,None]
    assert cal(p)[:,0].tolist() == [0, 0, .4, .4, .4]
    tiny = Calibration('isotonic', ('a',), x=((0., 1e-310),), y=((.2, .7),))
    assert .2 <= tiny([[5e-311]])[0,0] <= .7                                               # the slope is beyond float64


def test_thresholds_say_yes_from_the_threshold_on():
    t = Thresholds(['AF', 'PVC'], [.5, None], 'best f1')
    assert t([[.5, 1.], [.4999, 1.]]).tolist() == [[True, False], [False, False]] and t.at == (.5, np.inf)
    assert t.as_dict() == dict(names=['AF', 'PVC'], at=[.5, None], rule='best f1') and Thresholds.from_dict(dict(names=['AF'], at=[1])).at == (1.,)
    p, y = expit(truth(200)[0]), truth(200)[1]
    table = choose_thresholds(p, y, list('abc'), sensitivity=.8)
    kept = Thresholds.of(table)
    assert kept.rule == 'sensitivity >= 0.8' and kept.names == ('a', 'b', 'c')
    assert_array_equal(kept(p), p >= table.threshold.to_numpy())
    with pytest.raises(ValueError, match=r'\[n_records, 3\]'): kept(p[:,:2])
