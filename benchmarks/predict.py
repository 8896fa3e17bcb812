"""What one prediction from a WFDB file takes, and where it goes; many at once; onnxruntime; loading

    OMP_NUM_THREADS=1 python benchmarks/predict.py [--sizes tiny small base] [--seconds 6] [--out benchmarks/predict]

Made-up ten-second records of twelve leads in format 16. `pma`: recorded at 100 Hz and read so, one window of 1,000 samples, patches of 50. `stmem`: recorded at 500 Hz, read at 250 Hz with ST-MEM's filters, three windows of 2,250 samples,
patches of 75. The models are `ViT1d` with the paper's PMA head, five labels, calibrated by Platt's method, untrained: what they say is of no use, how long they take is the same. Files are in the page cache.

one      `load_pma(folder).predict(path)`. Each function below is timed by itself, without those of the list that it calls:
             header      parse a header by our rules and by wfdb's, hold it against its files (`headers._parse`)
             signal      wfdb's reading of the signals, which parses the header again (`records._rdrecord`)
             checks      the rest of `check_record`: what is odd about the samples, and their hash
             resample    `records.resample`
             filter      `records.zero_phase`
             windows     cutting, standardising, filling (`Preprocess.window`)
             model       windows -> outputs (`Predictor._outputs`)
             decide      mean over windows, calibration, thresholds (`Predictor._decide`)
             rest        what is left of the whole: units, order of leads, tables
         `reads` is how often the record's signals are read. Medians over the turns; shares are of the sum of the medians, `ms` is the median of the whole, with its lowest and highest.
many     64 different records (of `base` 16) in one call (`predict([…])`) against one call for each: ms a record, the ratio of a turn's two times
runtime  the model alone, torch against onnxruntime (one thread) with the file of `export_onnx`: ms a window with one and with 64 (of `base` 16) windows at a time, the ratio of a turn's two times
load     seconds of `load_pma` and of an onnxruntime session, MB of both files, seconds of `export_onnx` with its check

Seconds are those of this process on the processor, so other work on the machine counts less. The two of a pair take turns, who goes first alternates; ratios are medians over the turns with the lowest and the highest. Each takes as many turns
as fit in `--seconds`, between 3 and 30, after one that is not counted. One thread. About a quarter of an hour, most of it loading `base`.
"""
import argparse, csv, os, tempfile, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script')
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
import numpy as np, onnxruntime, torch
from fastai_ecg_pma import decide, headers, predict, records, saved
from fastai_ecg_pma.calibrate import Calibration
from fastai_ecg_pma.thresholds import Thresholds
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.encoder import make_vit
from fastai_ecg_pma.export import export_onnx
from fastai_ecg_pma.learner import pma_learner
from fastai_ecg_pma.synth import simulate_ecg, write_record

LABELS = ['NORM', 'MI', 'STTC', 'CD', 'HYP']
KINDS = dict(pma=(100, 50), stmem=(500, 75))           # Hz of the records, samples a patch
STAGES = dict(header=(headers, '_parse'), signal=(records, '_rdrecord'), checks=(predict, 'check_record'), resample=(records, 'resample'), filter=(records, 'zero_phase'),
              windows=(records.Preprocess, 'window'), model=(predict.Predictor, '_outputs'), decide=(predict.Predictor, '_decide'))

class Stages:
    "Inside, seconds of each of `STAGES` without those of the others that it calls: `seconds`, and how often each ran: `calls`"
    def __enter__(self):
        self.seconds, self.calls, self.inner = Counter(), Counter(), [0.]
        self.was = {k: getattr(owner, name) for k,(owner,name) in STAGES.items()}
        for k,(owner,name) in STAGES.items(): setattr(owner, name, self.timed(k, self.was[k]))
        return self

    def timed(self, k, f):
        def g(*args, **kwargs):
            self.inner.append(0.); start = process_time()
            try: return f(*args, **kwargs)
            finally:
                took = process_time() - start
                self.seconds[k] += took - self.inner.pop(); self.calls[k] += 1
                self.inner[-1] += took
        return g

    def __exit__(self, *_):
        for k,(owner,name) in STAGES.items(): setattr(owner, name, self.was[k])

def seconds(f):
    start = process_time(); f()
    return process_time() - start

def enough(f, limit):
    "Results of `f(turn)`, after one that is not counted"
    f(0); out, start = [], process_time()
    while len(out) < 3 or process_time() - start < limit and len(out) < 30: out.append(f(len(out)))
    return out

def pairs(a, b, limit):
    "Seconds of `a` and `b` in turns: medians, and the ratio with its lowest and highest"
    ts = enough(lambda i: (seconds(a), seconds(b)) if i % 2 else tuple(reversed((seconds(b), seconds(a)))), limit)
    r = [x/y for x,y in ts]
    return median(x for x,_ in ts), median(y for _,y in ts), dict(ratio=median(r), low=min(r), high=max(r), turns=len(ts))

def make(kind, size):
    prep, n = records.PREPROCESS[kind], 8
    x = np.random.default_rng(0).standard_normal((n, 12, prep.seq_len), np.float32)
    dls = ecg_dls(x, np.eye(5, dtype=np.float32)[np.arange(n) % 5], LABELS, np.arange(n) >= 5, prep, bs=2)
    torch.manual_seed(0)
    p = decide.predictor(pma_learner(dls, make_vit(dls, size, KINDS[kind][1]), seed=0), score=False)
    return replace(p, calibration=Calibration('platt', LABELS, a=[1.]*5, b=[.1]*5), thresholds=Thresholds(tuple(LABELS), (.5,)*5))

def one(p, path, limit):
    def turn(i):
        with Stages() as s: total = seconds(lambda: p.predict(path))
        return dict(ms=total*1e3, rest=(total - sum(s.seconds.values()))*1e3, **{k: s.seconds[k]*1e3 for k in STAGES}), s.calls['signal']
    ts, ns = zip(*enough(turn, limit))
    whole = [t['ms'] for t in ts]
    return dict(ms=median(whole), low=min(whole), high=max(whole), reads=ns[0], turns=len(ts), **{k: median(t[k] for t in ts) for k in (*STAGES, 'rest')})

def session(file):
    (o := onnxruntime.SessionOptions()).intra_op_num_threads = o.inter_op_num_threads = 1
    o.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), o, providers=['CPUExecutionProvider'])

def runtime(p, file, n, limit):
    x, s = torch.randn(n, len(p.prep.leads), p.prep.seq_len), session(file)
    assert np.abs(p._outputs(x)[0] - s.run(None, {'x': x.numpy()})[0]).max() < 1e-5
    a, b, r = pairs(lambda: p._outputs(x), lambda: s.run(None, {'x': x.numpy()}), limit)
    return dict(windows=n, torch_ms=a/n*1e3, onnxruntime_ms=b/n*1e3, **r)

class Table:
    "Rows, printed and written as they come"
    def __init__(self, folder, name): self.file, self.name, self.rows = Path(folder)/f'{name}.csv', name, []
    def add(self, **row):
        self.rows.append(dict(row, load_of_machine=os.getloadavg()[0], torch=torch.__version__, onnxruntime=onnxruntime.__version__, threads=torch.get_num_threads()))
        self.file.parent.mkdir(exist_ok=True, parents=True)
        with self.file.open('w', newline='') as f:
            (w := csv.DictWriter(f, self.rows[0], lineterminator='\n')).writeheader()
            w.writerows({k: f'{v:.4g}' if isinstance(v, float) else v for k,v in r.items()} for r in self.rows)
        print(f'{self.name:8}', '  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k,v in row.items()), flush=True)

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--sizes', nargs='+', default=['tiny', 'small', 'base'])
    a.add_argument('--seconds', type=float, default=6)
    a.add_argument('--out', default=Path(__file__).parent/'predict')
    args = a.parse_args()
    torch.set_num_threads(1)
    tables = {n: Table(args.out, n) for n in ('one', 'many', 'runtime', 'load')}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        paths = {k: [d/k/f'{i:02d}' for i in range(64)] for k in KINDS}
        for k,ps in paths.items():
            for i,q in enumerate(ps): write_record(simulate_ecg(rng=i, fs=KINDS[k][0]), q, KINDS[k][0])
        for size in args.sizes:
            for kind in KINDS:
                row, folder, file = dict(size=size, kind=kind), d/f'{size}-{kind}', d/f'{size}-{kind}.onnx'
                make(kind, size).save(folder)
                loads = enough(lambda i: seconds(lambda: saved.load_pma(folder)), args.seconds/2)
                p = saved.load_pma(folder)
                tables['one'].add(**row, **one(p, paths[kind][0], args.seconds))
                many = paths[kind][:16 if size == 'base' else 64]
                if kind == 'pma':
                    x, y, r = pairs(lambda: [p.predict(q) for q in many], lambda: p.predict(many), args.seconds)
                    tables['many'].add(**row, records=len(many), one_ms=x/len(many)*1e3, many_ms=y/len(many)*1e3, **r)
                exported = seconds(lambda: export_onnx(p, file))
                for n in (1, len(many)) if kind == 'pma' else (1,): tables['runtime'].add(**row, **runtime(p, file, n, args.seconds))
                tables['load'].add(**row, load_s=median(loads), session_s=median(enough(lambda i: seconds(lambda: session(file)), args.seconds/2)), export_s=exported,
                                   folder_mb=sum(f.stat().st_size for f in folder.iterdir())/1e6, onnx_mb=file.stat().st_size/1e6)
