"""What the cache gives: an epoch of batches from it against reading WFDB files each time, the time of building it, and the memory both take

    OMP_NUM_THREADS=1 python benchmarks/cache.py [--n 1000 2000 4000] [--workers 0 2] [--fs 500] [--dtype float16] [--bs 64] [--reps 5] [--link]

Made-up ten-second records of twelve leads (WFDB format 16), written once to a temporary folder. `--link` writes 200 of them and gives them `n` names by hard links: the
signal files are then few and always in the page cache, the cache file is of full size.

**Speed.** One epoch in shuffled batches of standardised windows, from files (`Preprocess` called on each record of a batch) and from the cache (`EcgArray` indexed with the batch, and the
same through tsai's loader), in alternate turns over 500 records; medians, ratio with the lowest and the highest of the turns. All files are in the page cache, for both: on a
cold disk the WFDB files, two a record, lose more.

**Memory** is resident memory, each figure in a fresh process: the peak (`VmHWM`) over what the process held after its imports, and the peak itself. For building, that of the main process;
with workers, `all` is the largest sum of proportional shares (`Pss`) of it and its workers, sampled every 0.2 s. The imports are fastai's, tsai's and PyTorch's for an epoch, and wfdb's and pandas' for
building. The slope is a least-squares line over `n`; it is steeper below some 4,000 records, whose file a process may hold mapped in good part
(`RESIDENT`), than beyond. `--n 5000 10000 21799 --workers 2 --link` reaches PTB-XL's number itself: 2.6 GB of cache and about ten minutes. On Linux alone.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, threading, time, warnings
from pathlib import Path
from statistics import median
import numpy as np

PTBXL = 21_799

def resident(field): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(field))

def prep_of(args):
    from fastai_ecg_pma.records import Preprocess
    return Preprocess(fs=args.fs, seq_len=10*args.fs, dtype=args.dtype)

def names(n): return [f'{i//1000:02d}/{i:05d}' for i in range(n)]

def write(folder, n, fs, link):
    "`n` records, or hard links to 200 under `n` names"
    from fastai_ecg_pma.synth import simulate_ecg, write_record
    for i,name in enumerate(names(n)):
        (folder/name).parent.mkdir(exist_ok=True, parents=True)
        if not link or i < 200: write_record(simulate_ecg(rng=i, fs=fs), folder/name, fs)
        else:
            first = names(200)[i%200]
            (folder/f'{name}.hea').write_text((folder/f'{first}.hea').read_text().replace(Path(first).name, Path(name).name))
            os.link(folder/f'{first}.dat', folder/f'{name}.dat')
    for f in folder.rglob('*.*'): os.utime(f, (0, 1_700_000_000))

def share(pid):
    "MB of a process, memory that it shares counted in part"
    try: return next(int(l.split()[1])/1024 for l in open(f'/proc/{pid}/smaps_rollup') if l.startswith('Pss:'))
    except (OSError, StopIteration): return 0

def family(stop, peaks):
    "The largest sum over this process and its workers until `stop`"
    me = os.getpid()
    while not stop.wait(.2):
        children = [int(c) for t in Path(f'/proc/{me}/task').glob('*/children') for c in t.read_text().split()]
        peaks.append(sum(map(share, [me, *children])))

def build(args, n, n_workers, sample=False):
    "`(seconds, MB over imports, MB, MB of all processes)` of building in this process"
    from fastai_ecg_pma.cache import cache_ecg
    out, before = args.folder/f'cache_{n}_{args.dtype}', resident('VmRSS')
    shutil.rmtree(out, ignore_errors=True)
    stop, peaks = threading.Event(), [0]
    watch = threading.Thread(target=family, args=(stop, peaks)); watch.start()
    start = time.perf_counter()
    cache_ecg(args.folder/'wfdb', names(n), out, prep=prep_of(args), n_workers=n_workers, progress=False)
    seconds = time.perf_counter() - start
    stop.set(); watch.join()
    return seconds, resident('VmHWM') - before, resident('VmHWM'), max(peaks)

def loaders(args, n, k):
    "The first `k` of `n` records as an array, and in tsai's loader"
    from tsai.data.core import TSDatasets
    from fastai_ecg_pma.cache import EcgCache
    from fastai_ecg_pma.windows import EcgArray
    from fastai_ecg_pma.data import EcgDataLoaders
    X = EcgArray(EcgCache(args.folder/f'cache_{n}_{args.dtype}', check_sources=False), range(k))
    dsets = TSDatasets(X, splits=(list(range(k)), [0]), inplace=False)
    return X, EcgDataLoaders.from_dsets(dsets.subset(0), dsets.subset(1), bs=[args.bs, 1], device='cpu')

def epoch_memory(args, n):
    "`(MB over imports, MB)` of two shuffled epochs through tsai's loader, without a model"
    import fastai_ecg_pma.learner                                           # noqa: F401 — what a training imports
    from fastai_ecg_pma.data import EcgDataLoaders                          # noqa: F401
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                           # forget the peak of the imports
    _, dls = loaders(args, n, n)
    for _ in range(2):
        for b in dls.train: pass
    return resident('VmHWM') - before, resident('VmHWM')

def speed(args, n, k):
    "Milliseconds a record of an epoch `[reps][3]`: from files, from the cache, from the cache through tsai's loader"
    X, dls = loaders(args, n, k)
    prep, paths = prep_of(args), [args.folder/'wfdb'/p for p in names(k)]
    def files(): return [np.stack([prep(paths[i]) for i in b]) for b in batches(k, args.bs)][-1:]
    def cache(): return [X[b] for b in batches(k, args.bs)][-1:]
    def loader(): return [b for b in dls.train][-1:]
    return (1000/k*np.array(turns([files, cache, loader], args.reps))).tolist()

def batches(n, bs): return np.split(np.random.permutation(n), range(bs, n, bs))

def turns(fs, reps):
    def timed(f): start = time.perf_counter(); f(); return time.perf_counter() - start
    for f in fs[1:]: f()
    return [[t for _,t in sorted((i, timed(fs[i])) for i in (range(len(fs)), range(len(fs)-1, -1, -1))[r%2])] for r in range(reps)]

def fresh(args, what, *more):
    cmd = [sys.executable, '-W', 'ignore', __file__, '--inside', what, *map(str, more), '--folder', str(args.folder), '--fs', str(args.fs), '--dtype', args.dtype,
           '--bs', str(args.bs), '--reps', str(args.reps)]
    return json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])

def line(x, y):
    "Slope per 1,000 records and value at PTB-XL's number"
    a, b = np.polyfit(x, y, 1) if len(x) > 1 else (0, y[0])
    return 1000*a, a*PTBXL + b

def report(args):
    print(f'{args.fs} Hz, {args.dtype}, {"hard links to 200 records" if args.link else "all records different"}, {os.cpu_count()} cores', flush=True)
    write(args.folder/'wfdb', max(args.n), args.fs, args.link)
    print(f'{"records":>8}{"workers":>9}{"building":>12}{"a record":>11}{"MB over imports":>17}{"MB":>7}{"MB of all":>11}{"epochs: MB over imports":>25}{"MB":>7}')
    over, total = [], []
    for n in args.n:
        for w in args.workers:
            t, extra, peak, everybody = fresh(args, 'build', n, w)
            mem = fresh(args, 'epoch', n) if w == args.workers[-1] else None
            print(f'{n:8}{w:9}{t:10.1f} s{1000*t/n:8.1f} ms{extra:17.0f}{peak:7.0f}{everybody:11.0f}' + (f'{mem[0]:25.0f}{mem[1]:7.0f}' if mem else ''), flush=True)
        over.append((extra, mem[0])); total.append((everybody, mem[1]))
    for i,name in enumerate(('building', 'epochs')):
        slope, at = line(args.n, [t[i] for t in total])
        print(f'{name}: {slope:+.1f} MB of resident memory for 1,000 more records; at {PTBXL:,} records {at:.0f} MB' + ('' if max(args.n) >= PTBXL else ', extrapolated'))
    k = min(500, *args.n)
    t = np.array(fresh(args, 'speed', max(args.n), k))
    print(f"one epoch of {k} records, ms a record: {np.median(t[:,0]):.2f} from WFDB files")
    for i,name in ((1, 'EcgArray'), (2, "tsai's loader")):
        r = t[:,0]/t[:,i]
        print(f'{np.median(t[:,i]):44.2f} from the cache, {name}: {median(r):.0f} times faster ({r.min():.0f} to {r.max():.0f})')

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, nargs='+', default=[1000, 2000, 4000])
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    p.add_argument('--fs', type=int, default=500)
    p.add_argument('--dtype', default='float16')
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--reps', type=int, default=5)
    p.add_argument('--folder', type=Path, help='where to write; removed afterwards')
    p.add_argument('--link', action='store_true', help='few signal files under many names')
    p.add_argument('--inside', nargs='+', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        what, *more = args.inside
        print(json.dumps(dict(build=build, epoch=epoch_memory, speed=speed)[what](args, *map(int, more)))); sys.exit()
    given = args.folder
    args.folder = Path(tempfile.mkdtemp(dir=given))
    try: report(args)
    finally: shutil.rmtree(args.folder)
