"""The cache under adversity: killed, interrupted, out of space, built twice at once, its workers shot; and tsai's loaders on top of it

    python tests/test_cache.py 200       # 200 random kills by hand, and one crash at every line of the builder
"""
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np, pytest
from filelock import FileLock

from fastai_ecg_pma import cache as module
from fastai_ecg_pma.cache import EcgCache, StaleCache, cache_ecg
from fastai_ecg_pma.windows import RANDOM, EcgArray, InMemory, aggregate_windows, windows_table
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.synth import simulate_ecg, write_record

N, PREP, OTHER = 24, Preprocess(dtype='float16'), Preprocess(fs=50)
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='processes are watched through /proc')


def records(folder, n=N, fs=100):
    for i in range(n): write_record(simulate_ecg(rng=i, fs=fs, noise=False), folder/f'r{i}', fs)
    for f in folder.iterdir(): os.utime(f, (0, 1_700_000_000))               # of fresh files a cache does not keep the time
    return folder

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return records(tmp_path_factory.mktemp('records'))


def names(n=N): return [f'r{i}' for i in range(n)]

def build(folder, out, workers=0, n=N, prep=PREP, **kw): return cache_ecg(folder, names(n), out, prep=prep, n_workers=workers, progress=False, **kw)

def files(out): return {f: (out/f).read_bytes() for f in ('signal.bin', 'index.jsonl', 'table.json', 'manifest.json')}

def n_lines(out): return (out/'index.jsonl').read_bytes().count(b'\n') if (out/'index.jsonl').exists() else 0

def is_whole(out, want):
    "Whole and right, or absent: nothing between"
    try: EcgCache(out, verify=True)
    except FileNotFoundError: return False
    assert files(out) == want
    return True


def in_child(f):
    "Run `f` in a process group of its own, without its output -> pid"
    if pid := os.fork(): return pid
    code = 1
    try:
        os.setsid()
        for fd in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        f()
        code = 0
    finally: os._exit(code)

def members(group):
    "Living processes of a group"
    out = []
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: state, _, pgrp = p.read_text().rpartition(')')[2].split()[:3]
        except OSError: continue                                            # gone meanwhile
        if int(pgrp) == group and state != 'Z': out.append(int(p.parent.name))
    return out

def code_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_often(folder, out, kills, workers, rng):
    "Builds killed at random times until they are through, again and again until there were `kills` -> (kills, kills while records were read, builds)"
    start = time.perf_counter()
    assert code_of(in_child(lambda: build(folder, out, workers))) == 0
    whole, want, n, midway, builds = time.perf_counter() - start, files(out), 0, 0, 0
    while n < kills:
        shutil.rmtree(out); lines = 0
        while not is_whole(out, want):
            pid = in_child(lambda: build(folder, out, workers))
            time.sleep(rng.uniform(0, whole))
            os.kill(pid, signal.SIGKILL)
            n += code_of(pid) == -signal.SIGKILL
            until = time.time() + 5
            while members(pid):                                             # orphans would hold the lock
                assert time.time() < until, 'its workers outlive a killed builder'
                time.sleep(.01)
            assert n_lines(out) >= lines, 'work that was done is lost'
            lines = n_lines(out)
            midway += 1 < lines <= N
        builds += 1
    return n, midway, builds

@pytest.mark.parametrize('workers', [0, 2])
def test_killed_at_random(folder, tmp_path, workers):
    n, midway, _ = kill_often(folder, tmp_path/'cache', 4, workers, random.Random(workers))
    assert n >= 4


def crash_at(k, f):
    "Run `f` in a process that ends, without any cleaning up, before line `k` of the cache's module is executed -> did it?"
    def trace(frame, event, arg):
        if frame.f_code.co_filename != module.__file__: return None
        nonlocal left
        left -= event == 'line'
        if left < 0: os._exit(9)
        return trace
    def run(): sys.settrace(trace); f()
    left = k
    code = code_of(in_child(run))
    assert code in (0, 9)
    return code == 9

def crash_everywhere(folder, out, step, first=0):
    "A build that ends before line `first`, `first+step`, … -> number of crashes"
    build(folder, out, n=3)
    want, k = files(out), first
    while True:
        shutil.rmtree(out)
        crashed = crash_at(k, lambda: build(folder, out, n=3))
        assert crashed or is_whole(out, want)
        is_whole(out, want)
        build(folder, out, n=3)
        assert files(out) == want
        if not crashed: return k//step
        k += step

def crash_overwriting(folder, out, step, first=0):
    "The same for a cache that replaces one of other preprocessing: the old one is whole, or there is none, or the new one is"
    build(folder, out, n=3); new = files(out); shutil.rmtree(out)
    build(folder, out, n=3, prep=OTHER); old, k = files(out), first
    while True:
        crashed = crash_at(k, lambda: build(folder, out, n=3, overwrite=True))
        if (out/'manifest.json').exists() and files(out) == old: assert len(EcgCache(out, OTHER)) == 3
        else: is_whole(out, new)
        try: build(folder, out, n=3)
        except StaleCache: build(folder, out, n=3, overwrite=True)
        assert files(out) == new
        if not crashed: return k//step
        build(folder, out, n=3, prep=OTHER, overwrite=True); assert files(out) == old
        k += step

def test_a_crash_before_any_line(folder, tmp_path):
    assert crash_everywhere(folder, tmp_path/'cache', 53, random.randrange(53)) > 3
    assert crash_overwriting(folder, tmp_path/'other', 53, random.randrange(53)) > 3


def ignores_ctrl_c(pid):
    "Has a process come so far that it leaves Ctrl-C to another?"
    try: status = Path(f'/proc/{pid}/status').read_text()
    except OSError: return False                                            # gone meanwhile
    return bool(int(status.partition('SigIgn:')[2].split()[0], 16) >> signal.SIGINT-1 & 1)

def test_ctrl_c_ends_builder_and_workers_and_loses_nothing(folder, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cache as t; from pathlib import Path; t.Preprocess.read = t.waiting(t.Preprocess.read, Path({str(tmp_path/'go')!r})); "
            f"t.build(Path({str(folder)!r}), Path({str(tmp_path/'cache')!r}), 6, 4)")
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.time() + 60
    while sum(map(ignores_ctrl_c, members(p.pid))) < 6 and time.time() < until: time.sleep(.01)    # six workers, two of them idle
    os.killpg(p.pid, signal.SIGINT)                                          # a terminal's Ctrl-C reaches all of them
    (tmp_path/'go').touch()
    _, err = p.communicate(timeout=60)
    assert p.returncode != 0 and err.count('Traceback') == err.count('KeyboardInterrupt') == 1, err
    assert members(p.pid) == [] and n_lines(tmp_path/'cache') <= 4
    build(folder, tmp_path/'cache', n=4); build(folder, tmp_path/'want', n=4)
    assert files(tmp_path/'cache') == files(tmp_path/'want')

def waiting(f, go):
    "Ctrl-C comes while all of them are at a record, on a busy machine too"
    def read(*args):
        while not go.exists(): time.sleep(.01)
        return f(*args)
    return read


class Deadly(Preprocess):
    def read(self, path):
        if path.name == 'r9': os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path)

class Broken(Preprocess):
    def read(self, path):
        if path.name == 'r9': raise OSError(5, 'Input/output error')
        return super().read(path)

@pytest.mark.parametrize('prep,error,says', [(Deadly, RuntimeError, 'a worker was killed'), (Broken, OSError, 'Input/output error')])
def test_what_is_no_fault_of_a_record_stops_the_build_and_loses_nothing(folder, tmp_path, prep, error, says):
    with pytest.raises(error, match=says) as e: build(folder, tmp_path/'cache', 2, prep=prep(dtype='float16'))
    kept = n_lines(tmp_path/'cache') - 1
    assert f'{kept} of {N} records are kept' in str(e.value) and kept <= 9
    assert (kept == 9) or prep is Deadly
    build(folder, tmp_path/'cache'); build(folder, tmp_path/'want')
    assert files(tmp_path/'cache') == files(tmp_path/'want')


def test_every_record_that_was_read_is_kept(folder, tmp_path):
    assert code_of(in_child(lambda: build(folder, tmp_path/'cache', prep=Deadly(['I'], dtype='float16')))) == -signal.SIGKILL
    assert n_lines(tmp_path/'cache') == 1+9 and (tmp_path/'cache'/'signal.bin').stat().st_size == 9*2_000


def test_disk_full(folder, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))        # four records and a bit
        try: build(folder, tmp_path/'cache')
        except OSError as e: (tmp_path/'says').write_text(str(e)); raise
    assert code_of(in_child(limited)) == 1
    assert f'File too large. 4 of {N} records are kept in' in (tmp_path/'says').read_text() and 'run again to go on' in (tmp_path/'says').read_text()
    build(folder, tmp_path/'cache'); build(folder, tmp_path/'want')
    assert files(tmp_path/'cache') == files(tmp_path/'want')


def test_two_builders(folder, tmp_path, monkeypatch):
    build(folder, tmp_path/'cache')
    monkeypatch.setattr(module, 'LOCK_WAIT', .1)
    with FileLock(tmp_path/'cache'/'lock'), pytest.raises(RuntimeError, match='another process'): build(folder, tmp_path/'cache')
    monkeypatch.undo()
    shutil.rmtree(tmp_path/'cache')
    pids = [in_child(lambda: build(folder, tmp_path/'cache', 2)) for _ in range(3)]
    assert [code_of(p) for p in pids] == [0, 0, 0]                           # the later ones wait, and find it done
    assert is_whole(tmp_path/'cache', files(build(folder, tmp_path/'want').path))


def file_rss(): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('RssFile'))

def test_an_epoch_leaves_little_of_the_file_in_memory(tmp_path, monkeypatch):
    records(tmp_path/'records', 80, fs=500)
    c = build(tmp_path/'records', tmp_path/'cache', prep=Preprocess(fs=500, seq_len=5000), n=80)      # 19 MB
    X, grown = EcgArray(c), {}
    for limit in (2**20, 2**40):
        monkeypatch.setattr(module, 'RESIDENT', limit)
        c._map.madvise(4)
        before = file_rss()
        for i in np.random.permutation(80): X[i]
        grown[limit] = file_rss() - before
    assert grown[2**20] < 5 and grown[2**40] > 15, grown


# tsai's loaders

@pytest.fixture(scope='module')
def long_cache(tmp_path_factory):
    d = tmp_path_factory.mktemp('long')
    for i in range(12): write_record(simulate_ecg(rng=i, seconds=25 if i%3 else 10), d/f'r{i}', 100)
    return cache_ecg(d, names(12), d/'cache', prep=Preprocess(stride=500, dtype='float16'), progress=False)

def make_dls(source, prep, y=None, num_workers=0):
    "Eight records for training, in random crops; all windows of four for validation -> (dls, X, table of windows, validation rows)"
    from tsai.data.core import TSDatasets
    from fastai_ecg_pma.data import EcgDataLoaders
    t, _ = windows_table(source, prep, random=np.arange(12) < 8)
    X, valid = EcgArray(source, t.record, t.start, prep), np.flatnonzero(t.record >= 8)
    dsets = TSDatasets(X, None if y is None else y[t.record], splits=(list(range(8)), valid.tolist()), inplace=False)
    dls = EcgDataLoaders.from_dsets(dsets.subset(0), dsets.subset(1), bs=[4, 3], num_workers=num_workers)
    dls.prep = prep
    return dls, X, t, valid

def epochs(dl, n=2): return [np.concatenate([b[0].cpu().numpy() for b in dl]) for _ in range(n)]

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('labelled', [False, True])
def test_loaders_read_it_in_place(long_cache, labelled, num_workers):
    from fastai.torch_core import set_seed
    import fastai_ecg_pma.data                                               # importing tsai may draw numbers too
    y = np.arange(12, dtype=np.float32) if labelled else None
    memory, seen = InMemory([np.array(long_cache.record(i)) for i in range(12)]), []
    for source in (long_cache, memory, memory):
        set_seed(0)
        dls, X, t, valid = make_dls(source, long_cache.prep, y, num_workers)
        seen.append(epochs(dls.train))
        assert (epochs(dls.valid, 1)[0] == X[valid]).all()
        if labelled: assert np.concatenate([b[1].cpu().numpy() for b in dls.valid]).tolist() == t.record[valid].tolist()
        else: assert len(dls.one_batch()) == 1
    assert (np.array(seen[0]) == seen[1]).all() and (np.array(seen[0]) == seen[2]).all()      # one seed, whatever the source
    assert not (seen[0][0] == seen[0][1]).all()                              # and every epoch crops of its own
    got = {x.tobytes() for e in seen[0] for x in e}
    assert len(got) > 12

def test_a_learner_trains_predicts_and_travels_without_the_cache(long_cache, tmp_path):
    import torch
    from fastai.learner import load_learner
    from fastai_ecg_pma.learner import pretrain_learner
    dls, X, t, valid = make_dls(long_cache, long_cache.prep)
    learn = pretrain_learner(dls, seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export(tmp_path/'learner.pkl')
    raw = (tmp_path/'learner.pkl').read_bytes()
    assert b'EcgArray' not in raw and b'EcgCache' not in raw and b'signal.bin' not in raw
    back = load_learner(tmp_path/'learner.pkl')
    windows = EcgArray(long_cache, t.record[valid], t.start[valid])
    assert torch.equal(next(iter(back.dls.valid.new_dl(windows, bs=len(valid))))[0].cpu(), torch.tensor(X[valid]))
    p = np.random.default_rng(0).random((len(valid), 2))
    assert len(aggregate_windows(p, t.record[valid])) == 4


if __name__ == '__main__':
    kills, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    d = Path(tempfile.mkdtemp())
    records(d/'records')
    for workers in (0, 2):
        n, midway, builds = kill_often(d/'records', d/f'killed{workers}', kills//2, workers, rng)
        print(f'{workers} workers: {n} kills ({midway} with records there and more to come), {builds} builds went through, all equal to an undisturbed one', flush=True)
    print(f"a crash before each of {crash_everywhere(d/'records', d/'crashed', 1)} lines of a build, "
          f"and of {crash_overwriting(d/'records', d/'over', 1)} lines of one that replaces another: equal to an undisturbed one", flush=True)
    shutil.rmtree(d)
