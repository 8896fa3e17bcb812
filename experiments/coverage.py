"""Does a 95 % interval cover the truth 95 % of the time? Of score() and compare(), with rare classes and several records a patient

    OMP_NUM_THREADS=1 python experiments/coverage.py [--out experiments/coverage] [--reps 2000] [--resamples 600] [--only SCENARIO]

Made-up patients with 1 to 3 records each. A record has its patient's diagnosis of a class with probability 0.8, and otherwise one drawn anew; scores are normal, with a part that is the patient's and a part that both models share,
and positives are shifted by a distance of their own in each class. Hence the true AUROC of each class is known, and so is its true average precision. Truth is their mean over the classes that a data set has. Each
repetition makes new patients, the two models' scores, and all intervals from the same resamples; its generator has the repetition's number. 2,000 repetitions know a coverage to ±1 % (two standard errors).

OUT/coverage.csv has a row for each scenario, metric, question (one model's score; the difference of two) and kind of interval: coverage, how often the truth is below and above, mean width. OUT/scenarios.csv says what the
scenarios are. About twelve minutes on one thread.
"""
import argparse, time, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from pathlib import Path
import numpy as np, pandas as pd
from scipy.special import ndtr
from fastai_ecg_pma.intervals import METHODS, Resampled, interval, p_value
from fastai_ecg_pma.metrics import class_auprcs, class_aurocs

SHIFTS = ((1.2, 2., 2.4, 1., 1.5), (1.1, 1.8, 2.5, .9, 1.4))                    # of the two models' positives, in standard deviations
SCENARIOS = dict(                                                              # patients, most records of one, shares of positives, shifts, metrics
    rare=(125, 3, (.035, .045, .06, .1, .3), SHIFTS, (class_aurocs, class_auprcs)),
    all_rare=(125, 3, (.035, .045, .06), SHIFTS, (class_aurocs,)),
    equal_models=(125, 3, (.035, .045, .06, .1, .3), SHIFTS[:1]*2, (class_aurocs,)),
    one_record_each=(250, 1, (.035, .045, .06, .1, .3), SHIFTS, (class_aurocs,)),
    more_patients=(400, 3, (.012, .02, .06, .1, .3), SHIFTS, (class_aurocs,)),
    beyond=(125, 3, (.008, .012, .02, .1, .3), SHIFTS, (class_aurocs,)))        # 2, 3, 5 positives: nothing is promised here


def simulate(rng, n_patients, most, share, shifts):
    "Patients of the records, their 0/1 targets, and two models' scores"
    patient = np.arange(n_patients).repeat(rng.integers(1, most+1, n_patients))
    size, share = (len(patient), len(share)), np.array(share)
    t = np.where(rng.random(size) < .8, (rng.random((n_patients, size[1])) < share)[patient], rng.random(size) < share)
    common, *own = (np.sqrt(.5)*(rng.normal(size=(n_patients, size[1]))[patient] + rng.normal(size=size)) for _ in range(3))
    return patient, t.astype(int), *(np.sqrt(.7)*common + np.sqrt(.3)*o + t*np.array(s[:size[1]]) for o, s in zip(own, shifts))


def truth(metric, share, shift):
    "AUROC or average precision of normal scores with these shifts"
    share, shift = np.array(share), np.array(shift[:len(share)])
    if metric is class_aurocs: return ndtr(shift/np.sqrt(2))
    at = np.linspace(9, -9, 20001)[:,None]
    recall, alarms = ndtr(shift - at), ndtr(-at)
    return np.trapezoid(share*recall/(share*recall + (1-share)*alarms), recall, axis=0)


def repetition(rng, metric, n_patients, most, share, shifts, n, seed):
    "Rows: question, method, covered, truth below, truth above, width"
    patient, t, *scores = simulate(rng, n_patients, most, share, shifts)
    r = Resampled(lambda counts: np.stack([metric(s, t, counts) for s in scores]).transpose(1, 2, 0).reshape(-1, 2*len(share)), len(t), patient, n, seed, 'bca')
    each = [x.reshape(-1, len(share), 2) for x in (r.point[None], r.drawn, r.without)]
    true = np.stack([truth(metric, share, s) for s in shifts], 1)[scored := ~np.isnan(each[0][0,:,0])]
    for question, of in dict(score=lambda x: x[...,0], difference=lambda x: x[...,0] - x[...,1]).items():
        point, drawn, without = (np.nanmean(y[~np.isnan(y).all(1)], 1) for y in map(of, each))
        real = of(true).mean()
        for method in METHODS:
            low, high = interval(point[0], drawn, without, method=method)
            yield question, method, low <= real <= high, real < low, real > high, high - low, p_value(point[0], drawn, without, method) <= .05


def coverage(name, metric, reps, n):
    "A row for each question and method"
    rows = [r for i in range(reps) for r in repetition(np.random.default_rng([i, list(SCENARIOS).index(name)]), metric, *SCENARIOS[name][:4], n, i)]
    t = pd.DataFrame(rows, columns=['question', 'method', 'coverage', 'below', 'above', 'width', 'p_below_05']).groupby(['question', 'method'], sort=False).mean().reset_index()
    t.loc[t.question == 'score', 'p_below_05'] = np.nan
    return t.assign(scenario=name, metric=metric.__name__, reps=reps, resamples=n)[['scenario', 'metric', *t.columns, 'reps', 'resamples']]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=Path('experiments/coverage'))
    p.add_argument('--reps', type=int, default=2000)
    p.add_argument('--resamples', type=int, default=600)
    p.add_argument('--only', nargs='+', choices=SCENARIOS, default=list(SCENARIOS))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for name in args.only:
        for metric in SCENARIOS[name][4]:
            t0 = time.perf_counter()
            tables.append(coverage(name, metric, args.reps, args.resamples).round(4))
            print(tables[-1].to_string(), f'{time.perf_counter()-t0:.0f} s', flush=True)
            pd.concat(tables).to_csv(args.out/'coverage.csv', index=False)
    pd.DataFrame([dict(scenario=k, patients=v[0], records=round(v[0]*(1+v[1])/2), positives=' '.join(f'{v[0]*(1+v[1])/2*s:.0f}' for s in v[2])) for k, v in SCENARIOS.items()]).to_csv(args.out/'scenarios.csv', index=False)
