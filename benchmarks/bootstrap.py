"""What an interval costs: the counted bootstrap against a loop over scikit-learn

    OMP_NUM_THREADS=1 python benchmarks/bootstrap.py [--classes 71] [--records 2198] [--resamples 1000] [--turns 7] [--naive 3]

PTB-XL's test fold in size: 71 classes from rare (0.2 %) to common (45 %) on 2,198 records, made-up scores with a tenth of them tied. The naive loop copies the records of a resample and asks scikit-learn for each class that
can be scored; of each turn's resamples it does the first `--naive` (all 1,000 would take minutes), and both give the same numbers. A turn times both in one process, who goes first alternates; 'times faster' is the
median of the turns' ratios of seconds a resample, with the lowest and the highest. Then the whole of `score` and `compare` with each kind of interval, drawing of patients included: median and range of `--turns`, all on one thread.
"""
import argparse, os, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')
from statistics import median
from time import perf_counter
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from fastai_ecg_pma.intervals import METHODS, compare, patient_counts, score
from fastai_ecg_pma.metrics import class_aurocs, class_auprcs


def made_up(n_classes, n_records, rng):
    t = (rng.random((n_records, n_classes)) < np.geomspace(.002, .45, n_classes)).astype(int)
    t[0], t[1] = 1, 0                                              # each class can be scored
    scores = rng.normal(size=(2, *t.shape)) + t
    return *np.where(rng.random(scores.shape) < .1, scores.round(1), scores), t, np.sort(rng.integers(0, int(n_records*.95), n_records))


def naive(f, s, t, counts):
    out = np.full((len(counts), t.shape[1]), np.nan)
    for r, c in enumerate(counts):
        i = np.arange(len(t)).repeat(c)
        for k in range(t.shape[1]):
            if 0 < t[i,k].sum() < len(i): out[r,k] = f(t[i,k], s[i,k])
    return out


def timed(f):
    start = perf_counter(); out = f()
    return out, perf_counter() - start


def ratio(metric, theirs, s, t, counts, turns, n):
    "Ratios of seconds a resample, and the seconds of all resamples"
    ratios, seconds = [], []
    metric(s, t, counts[:n])                                       # warm
    for i in range(turns):
        part = counts[i*n:i*n + n]
        jobs = dict(ours=lambda: metric(s, t, counts), naive=lambda: naive(theirs, s, t, part))
        took = {k: timed(jobs[k]) for k in (list(jobs) if i % 2 else list(jobs)[::-1])}
        np.testing.assert_allclose(took['ours'][0][i*n:i*n + n], took['naive'][0], atol=1e-10)
        ratios.append(took['naive'][1]/n / (took['ours'][1]/len(counts))); seconds.append(took['ours'][1])
    return ratios, seconds


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--classes', type=int, default=71)
    p.add_argument('--records', type=int, default=2198)
    p.add_argument('--resamples', type=int, default=1000)
    p.add_argument('--turns', type=int, default=7)
    p.add_argument('--naive', type=int, default=3)
    args = p.parse_args()
    a, b, t, patients = made_up(args.classes, args.records, np.random.default_rng(0))
    counts = patient_counts(patients, args.resamples)
    print(f'{args.classes} classes x {args.records} records x {args.resamples} resamples, one thread')
    for name, metric, theirs in (('AUROC', class_aurocs, roc_auc_score), ('average precision', class_auprcs, average_precision_score)):
        ratios, seconds = ratio(metric, theirs, a, t, counts, args.turns, args.naive)
        print(f'{name:18} {median(seconds):6.2f} s ({min(seconds):.2f}-{max(seconds):.2f}); times faster than the loop: {median(ratios):.0f} ({min(ratios):.0f}-{max(ratios):.0f})', flush=True)
    for method in METHODS:
        for name, f in (('score', lambda: score(a, t, patients, args.resamples, method=method)), ('compare', lambda: compare(a, b, t, patients, args.resamples, method=method))):
            seconds = [timed(f)[1] for _ in range(args.turns)]
            print(f'{name:8}{method:10} {median(seconds):6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})', flush=True)
