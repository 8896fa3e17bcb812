"Scores that hold: equal to scikit-learn where that is defined, defined where it is not, intervals that cover"
import importlib.util
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_curve, roc_auc_score

from fastai_ecg_pma.challenge_score import ChallengeScore, challenge_scores, challenge_vocab
from fastai_ecg_pma.intervals import METHODS, compare, compare_classes, delong, holm, interval, patient_counts, score, score_classes
from fastai_ecg_pma.metrics import (BrierLoss, CalibrationError, MacroAUPRC, MacroAUROC, MacroF1Max, auroc, average_precision, brier, class_auprcs, class_aurocs, class_briers, class_eces,
                                    class_f1s, class_table, ece, f1_max, f1_thresholds, macro, macro_auprc, macro_auroc)


def best_f1(t, s, **kw):
    p, r, _ = precision_recall_curve(t, s, **kw)
    return (2*p*r/np.maximum(p+r, 1e-300)).max()


def slow_ece(t, p, n_bins=15):
    edges, total = np.linspace(0, 1, n_bins+1), 0
    for lo, hi in zip(edges, edges[1:]):
        here = [i for i in range(len(p)) if lo < p[i] <= hi or lo == p[i] == 0]
        if here: total += abs(sum(p[i] - t[i] for i in here))/len(p)
    return total


SKLEARN = {auroc: roc_auc_score, average_precision: average_precision_score, f1_max: best_f1}
many = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    "Scores with many ties or none, targets with any number of positives (none and all among them), a few resamples"
    n, rng = draw(st.integers(1, 25)), np.random.default_rng(draw(st.integers(0, 2**32-1)))
    s = rng.integers(0, draw(st.sampled_from([1, 2, 5, 10**6])), n)/draw(st.sampled_from([1, 3, 7])) - draw(st.sampled_from([0, 2]))
    return s, (rng.random(n) < draw(st.sampled_from([0, .1, .5, .9, 1]))).astype(int), rng.integers(0, 4, (3, n))


@many
@given(cases())
def test_one_class_is_scikit_learns(case):
    s, t, counts = case
    for ours, theirs in SKLEARN.items():
        got = ours(s, t, np.r_[np.ones((1, len(t)), int), counts])
        for value, c in zip(got, [np.ones(len(t), int), *counts]):
            tt, ss = t.repeat(c), s.repeat(c)
            if 0 < tt.sum() < len(tt):
                np.testing.assert_allclose(value, theirs(tt, ss), atol=1e-12)                        # records written down as often
                np.testing.assert_allclose(value, theirs(t, s, sample_weight=c), atol=1e-12)
            else: assert np.isnan(value)


@many
@given(cases())
def test_probabilities_are_scored_as_written_down(case):
    s, t, counts = case
    p = 1/(1+np.exp(-s.clip(-30, 30)))
    p[:1] = 0                                                              # an edge
    for got, theirs in ((brier(p, t, counts), lambda t, p: ((p-t)**2).mean()), (ece(p, t, counts), slow_ece), (ece(p, t, counts, bins=4), partial(slow_ece, n_bins=4))):
        for value, c in zip(got, counts):
            if c.sum(): np.testing.assert_allclose(value, theirs(t.repeat(c), p.repeat(c)), atol=1e-12)
            else: assert np.isnan(value)
    if 0 < t.sum() < len(t): np.testing.assert_allclose(brier(p, t)[0], brier_score_loss(t, p), atol=1e-12)


@many
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32-1))
def test_macro_leaves_out_absent_classes(n, n_classes, seed):
    rng = np.random.default_rng(seed)
    s, t = rng.integers(0, 6, (n, n_classes))/6, (rng.random((n, n_classes)) < rng.choice([0, .5, 1], n_classes)).astype(int)
    can = (t.sum(0) > 0) & (t.sum(0) < n)
    for f, theirs in ((macro_auroc, roc_auc_score), (macro_auprc, average_precision_score)):
        if can.any(): np.testing.assert_allclose(f(s, t), np.mean([theirs(t[:,c], s[:,c]) for c in np.flatnonzero(can)]), atol=1e-12)
        else:
            with pytest.raises(ValueError, match=f'none of the {n_classes} classes'): f(s, t)
    np.testing.assert_allclose(macro(s, t, class_briers), ((s-t)**2).mean(), atol=1e-12)
    table = class_table(s, t)
    assert table.attrs['n_scored'] == can.sum() and (table.auroc.notna() == can).all() and (table.f1_max.notna() == can).all()
    said = s >= f1_thresholds(s, t)
    reached = 2*(said & (t == 1)).sum(0)/np.maximum(said.sum(0) + t.sum(0), 1)
    np.testing.assert_allclose(reached[can], table.f1_max[can], atol=1e-12)
    assert not said[:,~can].any()


@settings(many, max_examples=60)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**32-1), st.sampled_from(list(METHODS)), st.sampled_from([class_aurocs, class_auprcs, class_f1s, class_briers, class_eces]), st.sampled_from([0, 1, 7, 60]))
def test_point_is_in_its_interval(n, n_classes, seed, method, metric, resamples):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 9, (2, n, n_classes))/9
    t, patients = (rng.random((n, n_classes)) < rng.choice([.05, .5], n_classes)).astype(int), rng.integers(0, max(n//2, 1), n)
    t[:2,0] = 0, 1                                                           # one class can be scored
    kw = dict(patients=patients, n=resamples, metric=metric, method=method, seed=seed % 1000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r, d = score(a, t, **kw), compare(a, b, t, **kw)
        rows, both = score_classes(a, t, **kw), compare_classes(a, b, t, **kw)
    assert r.low <= r.point <= r.high and d.low <= d.point <= d.high and r == score(a, t, **kw)
    np.testing.assert_allclose(d.point, r.point - score(b, t, **kw).point, atol=1e-12)
    for x in (rows.dropna(), both.dropna()): assert ((x.low <= x.point) & (x.point <= x.high)).all()
    assert r.n_scored == rows.point.notna().sum() and r.n_patients == len(set(patients))
    if resamples and d.p <= .05: assert d.low > 0 or d.high < 0
    if resamples == 60 and method == 'percentile': assert (d.p <= .05) == (d.low > 0 or d.high < 0)
    assert np.isnan(d.p) if not resamples else not d.p < 2/(resamples+1) - 1e-9 and not d.p > 1


def test_resamples_are_of_patients():
    patients = np.random.default_rng(0).integers(0, 30, 100)
    counts = patient_counts(patients, 400, seed=3)
    assert all((counts[:,patients == p] == counts[:,patients == p][:,:1]).all() for p in set(patients))
    first = [counts[:,np.flatnonzero(patients == p)[0]] for p in sorted(set(patients))]
    assert (np.sum(first, 0) == len(first)).all() and abs(np.mean(first) - 1) < 1e-12 and .8 < np.var(first) < 1.1


def test_paired_is_narrower_than_apart():
    rng = np.random.default_rng(0)
    t, hard = rng.integers(0, 2, (200, 2)), rng.normal(size=(200, 2))
    a, b = (t + hard + .2*rng.normal(size=t.shape) for _ in 'ab')
    assert np.ptp([compare(a, b, t).low, compare(a, b, t).high]) < .5*np.ptp([score(a, t).low, score(a, t).high])


def test_delong_is_all_pairs():
    rng = np.random.default_rng(1)
    for _ in range(60):
        n = rng.integers(5, 30)
        t, (a, b) = (rng.random(n) < rng.choice([.2, .5])).astype(int), rng.integers(0, rng.choice([3, 1000]), (2, n))
        r = delong(a[:,None], b[:,None], t[:,None]).loc[0]
        if min(t.sum(), n - t.sum()) < 2: assert np.isnan(r.point); continue
        pairs = [[[float(s[i] > s[j]) + .5*(s[i] == s[j]) for j in np.flatnonzero(t == 0)] for i in np.flatnonzero(t == 1)] for s in (a, b)]
        (p1, q1), (p2, q2) = (((k := np.array(p)).mean(1), k.mean(0)) for p in pairs)
        var = sum((np.cov(x1, x1) + np.cov(x2, x2) - 2*np.cov(x1, x2))[0,1]/len(x1) for x1, x2 in ((p1, p2), (q1, q2)))
        np.testing.assert_allclose([r.point, r.se**2], [np.mean(p1) - np.mean(p2), var], atol=1e-12)


def test_compare_agrees_with_delong():
    rng = np.random.default_rng(2)
    t = (rng.random((800, 4)) < .3).astype(int); hard = rng.normal(size=t.shape)
    a, b = (t*k + hard + .5*rng.normal(size=t.shape) for k in (1.1, 1))
    ours, theirs = compare_classes(a, b, t, n=4000, method='percentile'), delong(a, b, t)
    np.testing.assert_allclose(ours.high - ours.low, theirs.high - theirs.low, rtol=.07)
    np.testing.assert_allclose(ours.p, theirs.p, atol=.06)
    np.testing.assert_allclose(ours.point, theirs.point, atol=1e-12)


@many
@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0., .01, .5, 1., np.nan])), max_size=9))
def test_holm_step_by_step(p):
    out, so_far, asked = [np.nan]*len(p), 0, [i for i in range(len(p)) if not np.isnan(p[i])]
    for k, i in enumerate(sorted(asked, key=lambda i: p[i])): so_far = out[i] = min(1, max(so_far, p[i]*(len(asked)-k)))
    np.testing.assert_allclose(holm(p), out, atol=1e-12)


def test_many_patients_are_left_out_in_groups():
    rng = np.random.default_rng(0)
    t = (rng.random((2500, 1)) < .3).astype(int); s = t + rng.normal(size=t.shape)
    one, plain = (score(s, t, n=500, method=m) for m in ('expanded', 'percentile'))
    assert 1 <= (one.high - one.low)/(plain.high - plain.low) < 1.05          # thousands of patients: nothing to allow for


def test_intervals_cover(root):
    "A small run of experiments/coverage.py, whose full run the page of `intervals` shows"
    spec = importlib.util.spec_from_file_location('coverage_experiment', root/'experiments'/'coverage.py')
    spec.loader.exec_module(experiment := importlib.util.module_from_spec(spec))
    found = experiment.coverage('all_rare', class_aurocs, 250, 200).set_index(['question', 'method']).coverage
    assert .91 <= found['score', 'expanded'] <= .985 and .91 <= found['difference', 'expanded'] <= .99
    assert found['score', 'expanded'] > found['score', 'percentile']
    rng = np.random.default_rng(0)                                           # the made-up truth is the truth
    patient, t, a, b = experiment.simulate(rng, 40_000, 3, (.1, .3), experiment.SHIFTS)
    for metric in (class_aurocs, class_auprcs):
        for s, shift in zip((a, b), experiment.SHIFTS): np.testing.assert_allclose(metric(s, t)[0], experiment.truth(metric, (.1, .3), shift), atol=.01)


def test_interval_ends_are_ranks():
    drawn = np.arange(1, 1000.)                                               # ranks (n+1)q: 25 and 975
    assert interval(500., drawn, drawn, method='percentile') == (25, 975) and interval(1., drawn, drawn, method='percentile') == (1, 975)
    assert interval(500., drawn, drawn, level=.5, method='percentile') == (250, 750)


METRICS = dict(macro_auroc=MacroAUROC, macro_auprc=MacroAUPRC, macro_f1_max=MacroF1Max, brier_loss=BrierLoss, calibration_error=CalibrationError)


def learner(tmp_path, metrics, vocab=3):
    "A linear model on separable records; the last class is absent from validation"
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, vocab))
    x = rng.normal(size=(160, 8)).astype(np.float32); y = (x @ w > 0).astype(np.float32)
    y[80:,-1] = 0
    def loader(i, **kw): return DataLoader(list(zip(torch.tensor(x[i]), torch.tensor(y[i]))), bs=16, **kw)
    torch.manual_seed(0)
    return Learner(DataLoaders(loader(slice(0, 80)), loader(slice(80, 160))), torch.nn.Linear(8, vocab), loss_func=BCEWithLogitsLossFlat(), metrics=metrics, path=tmp_path)


@pytest.mark.parametrize('name', METRICS)
def test_monitored_although_a_class_is_absent(tmp_path, name, capsys):
    learn = learner(tmp_path, [f() for f in METRICS.values()])
    assert learn.recorder is not None
    with learn.no_bar(), learn.no_logging(): learn.fit(4, .05, cbs=SaveModelCallback(monitor=name))
    said = capsys.readouterr().out
    values = np.array(learn.recorder.values)[:,2 + list(METRICS).index(name)]
    assert np.isfinite(np.array(learn.recorder.values)).all()
    better = np.minimum if name in ('brier_loss', 'calibration_error') else np.maximum
    best = better.reduce(values)
    times = (np.diff(better.accumulate(values)) != 0).sum() + 1
    assert said.count('Better model found') == times and f'{name} value: {best}' in said
    with learn.no_bar(): assert learn.validate()[2 + list(METRICS).index(name) - 1] == pytest.approx(best)      # the best is loaded


@pytest.mark.parametrize('name', METRICS)
def test_early_stopping_although_a_class_is_absent(tmp_path, name):
    learn = learner(tmp_path, [METRICS[name]()])
    with learn.no_bar(), learn.no_logging(): learn.fit(9, 0., cbs=EarlyStoppingCallback(monitor=name, patience=2))
    assert len(learn.recorder.values) == 3                                    # nothing is learned: stop after two epochs without a better one
    learn = learner(tmp_path, [METRICS[name]()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, .05, cbs=EarlyStoppingCallback(monitor=name, patience=1, min_delta=-1))
    assert len(learn.recorder.values) == 3


def test_challenge_score_is_monitored(tmp_path, capsys):
    vocab = ['AF', 'NSR', 'QAb']
    learn = learner(tmp_path, [ChallengeScore(vocab)])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, .05, cbs=SaveModelCallback(monitor='challenge_score'))
    assert 'Better model found at epoch 0 with challenge_score value' in capsys.readouterr().out


def test_challenge_score_counts_are_records():
    rng = np.random.default_rng(0)
    for year in (2020, 2021):
        n = len(challenge_vocab(year=year))
        t, p = (rng.random((2, 9, n)) < .15).astype(int)
        counts = rng.integers(0, 3, (6, 9))
        got = challenge_scores(p, t, counts, year=year)[:,0]
        np.testing.assert_allclose(got, [challenge_scores(p.repeat(c, 0), t.repeat(c, 0), year=year)[0,0] for c in counts], atol=1e-12)
