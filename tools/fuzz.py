"""Throw broken WFDB records at everything that reads them: `python tools/fuzz.py --cases 20000 --seed 0`

A case is a folder of headers and signal files, sound or broken on purpose, and the options to read it with. Everything that reads records (`read_header`, `read_ecg`,
`Preprocess`, `content_hash`, `check_records`) must give samples or raise `BadRecord` or `FileNotFoundError`, within `DEADLINE` seconds and within `bound` bytes. Where the case
is sound, the samples must be those that were written. Prints what was tried and found; exit status 1 if anything was.
"""
import argparse
import faulthandler
import io
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np, soundfile
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from fastai_ecg_pma.doctor import check_records, report
from fastai_ecg_pma.headers import BadRecord, read_header
from fastai_ecg_pma.leads import LEADS, lead_name
from fastai_ecg_pma.records import Preprocess, content_hash, read_ecg

DEADLINE = 20                                             # seconds that one call may take
MEMORY = 6*2**30                                         # bytes of address space for the whole process: a wild allocation fails at once
BITS = {'8': 8, '16': 16, '24': 24, '32': 32, '61': 16, '80': 8, '160': 16, '212': 12, '310': 10, '311': 10, '508': 8, '516': 16, '524': 24}
LEAD_NAMES = (*LEADS, 'MLII', 'ECG', 'lead v1', 'avr', 'ABP (mean)', 'ECG')


# ---- sound records, written independently of the code under test

def pack(fmt, d, spf):
    "Frames `[n, samples a frame]` of whole numbers as the bytes of signal format `fmt`"
    flat = d.reshape(-1)
    if fmt in ('16', '32', '61'): return flat.astype({'16': '<i2', '32': '<i4', '61': '>i2'}[fmt]).tobytes()
    if fmt == '8': return flat.astype('i1').tobytes()      # differences already
    if fmt == '80': return (flat + 128).astype('u1').tobytes()
    if fmt == '160': return (flat + 32768).astype('<u2').tobytes()
    if fmt == '24': return flat.astype('<i4').view('u1').reshape(-1, 4)[:, :3].tobytes()
    if fmt in ('508', '516', '524'): return flac(fmt, d, spf)
    if fmt == '212':
        a, b = (np.append(flat, np.zeros(len(flat) % 2, int)).reshape(-1, 2) & 0xfff).T
        return np.stack([a & 0xff, a >> 8 | (b >> 8) << 4, b & 0xff], 1).astype('u1').tobytes()[:-(-len(flat)*3//2)]
    a, b, c = (np.append(flat, np.zeros(-len(flat) % 3, int)).reshape(-1, 3) & 0x3ff).T
    if fmt == '311': return (a | b << 10 | c << 20).astype('<u4').tobytes()
    return np.stack([a << 1 | (c & 31) << 11, b << 1 | (c >> 5) << 11], 1).astype('<u2').tobytes()


def flac(fmt, d, spf):
    "As FLAC, which has one channel a signal"
    bits, n_sig, out = BITS[fmt], len(spf), io.BytesIO()
    x = d.reshape(len(d), n_sig, spf[0]).transpose(0, 2, 1).reshape(-1, n_sig)
    x = (x << 8 if bits != 16 else x).astype('int16' if bits != 24 else 'int32')
    soundfile.write(out, x, 100, format='FLAC', subtype={8: 'PCM_S8', 16: 'PCM_16', 24: 'PCM_24'}[bits])
    return out.getvalue()


@st.composite
def sound(draw, stem='r', n=None, names=None, flat=False):
    "`(files, truth)`: a sound record and, by lead, what must be read of it in mV"
    n = draw(st.sampled_from([1, 2, 3, 7, 40, 61, 90])) if n is None else n
    names = draw(st.lists(st.sampled_from(LEAD_NAMES), min_size=1, max_size=4, unique_by=lead_name)) if names is None else names
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    files, truth, lines, left = {}, {}, [], list(names)
    while left:
        here = [left.pop(0) for _ in range(draw(st.integers(1, len(left))))]
        fmt, offset = draw(st.sampled_from(list(BITS))), draw(st.sampled_from([0, 0, 24]))
        packed = fmt in ('508', '516', '524')
        spf = [1]*len(here) if flat else [draw(st.sampled_from([1, 1, 1, 2, 4]))]*len(here) if packed else [draw(st.sampled_from([1, 1, 1, 1, 2, 5])) for _ in here]
        offset *= not packed
        top = min(2**(BITS[fmt]-1) - 1, 2**20) if fmt != '8' else 100
        d = rng.integers(-top, top+1, (n, sum(spf)))
        if draw(st.booleans()) and fmt != '8': d[rng.integers(n), rng.integers(d.shape[1])] = -2**(BITS[fmt]-1)        # WFDB's code for an invalid sample
        file = f'{stem}{len(files) or ""}.{draw(st.sampled_from(["dat", "mat", "x"]))}'
        files[file] = bytes(offset) + pack(fmt, d, spf)
        for lead, s, col in zip(here, spf, np.split(d, np.cumsum(spf)[:-1], 1)):
            skew = draw(st.sampled_from([0, 0, 0, 0, n//2])) if not flat and fmt != '8' else 0
            gain, base = draw(st.sampled_from([200, 1000., .5, -10])), draw(st.sampled_from([0, 5, -1024]))
            unit, scale = ('mV', 1) if flat else draw(st.sampled_from([('mV', 1), ('uV', 1e-3), ('V', 1e3)]))
            v = col.reshape(-1).astype(float)
            init = int(rng.integers(-50, 50))
            if fmt == '8': v = v.cumsum() + init
            mv = np.where((v == -2**(BITS[fmt]-1)) & (fmt != '8'), np.nan, (v - base)/gain*scale)
            truth[lead_name(lead)] = np.concatenate([mv[skew*s:], np.full(skew*s, np.nan)])
            total = int(v.sum()) % 65536
            lines.append(f'{file} {fmt}{f"x{s}" if s > 1 else ""}{f":{skew}" if skew else ""}{f"+{offset}" if offset else ""} {gain}({base})/{unit} {BITS[fmt]} 0 {init} {total} 0 {lead}')
    fs = 100 if flat else draw(st.sampled_from([100, 250, 360, 62.5]))
    head = f'{stem} {len(lines)} {fs} {n}{draw(st.sampled_from(["", "", " 10:05:14", " 10:05:14 01/05/2000"]))}'
    files[f'{stem}.hea'] = '\n'.join([head, *lines, *draw(st.sampled_from([[], ['# Dx: 426783006'], ['# Größe: 180']]))]).encode() + b'\n'
    return files, truth


@st.composite
def joined(draw):
    "The same of a record in segments, of a fixed or a variable layout"
    names = draw(st.lists(st.sampled_from(LEADS), min_size=1, max_size=3, unique=True))
    variable, files, parts, truth = draw(st.booleans()), {}, [], {l: [] for l in names}
    for i in range(draw(st.integers(1, 3))):
        n, some = draw(st.integers(1, 40)), draw(st.lists(st.sampled_from(names), min_size=1, unique=True)) if variable else names
        more, read = draw(sound(f's{i}', n, some, flat=True))
        files |= more
        here = [(f's{i}', n)]*draw(st.sampled_from([1, 1, 1, 2])) + [('~', draw(st.integers(1, 50)))]*draw(st.sampled_from([0, 0, 1]))
        for seg, k in here:
            for l in names: truth[l].append(read[l] if seg != '~' and l in read else np.full(k, np.nan))
        parts += here
    if variable:
        files['lay.hea'] = '\n'.join([f'lay {len(names)} 100 0', *(f'~ 0 200/mV 16 0 0 0 0 {l}' for l in names)]).encode()
        parts.insert(0, ('lay', 0))
    files['r.hea'] = '\n'.join([f'r/{len(parts)} {len(names)} 100 {sum(n for _, n in parts)}', *(f'{s} {n}' for s, n in parts)]).encode()
    return files, {l: np.concatenate(v) for l, v in truth.items()}


# ---- breaking them

EXTREME = ['', '0', '1', '-1', '2', '3', '999', '65536', '2147483648', '99999999', '999999999999', '9'*15, '9'*16, '9'*400, '0.0', '1e3', '1e-320', '1e308', '1e999', '1.e5', '.5', '1e', 'nan', 'inf',
           '0x10', '１２', '٣', '1_0', '+5', '--5', '~', '~~', 'r', 's0', 's1', 'lay', 'r.dat', 'r1.x', '../r.dat', '/etc/passwd', '.', '..', '-', 'a'*3000, 'é', 'µV', 'μ', '\x00', '\x0b', '\x1c', '\x85',
           '\u2028', '\ud7ff', '\U0001f600', '#', '# x', '\r', '16x0', '16x99999', '16:3', '16:99999', '16+1', '16+99999', '508', '516', '524', '8', '24', '80', '212', '310', '311', '0', '77', '16x2:1+3',
           '200(5)/mV', '0(0)/mV', '200/furlong', '200(1e5)', '-0.0/mV', '1e-300/uV', '200/%', '200()/mV', 'r/2', 'r/0', 'r/99', 's0/2', 'r.mat', '100/5(3)', '100/', '100/0', '100(7)', '0.0000001',
           '25:61:61', '29/02/2021', '31/13/2000', '05-May-2020', '10:05:14.1234567', '::', '1/1/1', '01/01/9999', '1:1 1/1/0001']
JUNK = st.one_of(st.sampled_from(EXTREME), st.sampled_from(EXTREME), st.integers(-10, 10**6).map(str), st.text(max_size=6))


def tokens(text): return re.split(r'([ /():+x\n.]+)', text)


@st.composite
def edited(draw, raw):
    "A header with one to a few things wrong"
    t = tokens(raw.decode('utf-8', 'replace'))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 6]))):
        how, i, j = draw(st.sampled_from(['put', 'put', 'put', 'put', 'drop', 'twice', 'swap', 'insert', 'cut', 'lines'])), draw(st.integers(0, max(0, len(t)-1))), draw(st.integers(0, max(0, len(t)-1)))
        if how == 'put': t[i] = draw(JUNK)
        elif how == 'drop': del t[i:i+draw(st.integers(1, 4))]
        elif how == 'twice': t[i:i] = t[i:i+draw(st.integers(1, 30))]
        elif how == 'swap': t[i], t[j] = t[j], t[i]
        elif how == 'insert': t.insert(i, draw(JUNK))
        elif how == 'cut': t = t[:i]
        else:
            lines = ''.join(t).splitlines(True)
            t = tokens(''.join(draw(st.permutations(lines))[:draw(st.integers(0, len(lines)+1))])) if len(lines) < 30 else t
        t = t or ['']
    return ''.join(t).encode(draw(st.sampled_from(['utf-8', 'utf-8', 'latin-1', 'utf-16'])), 'replace')


@st.composite
def flipped(draw, raw):
    "Bytes with some of them changed, cut off, or added"
    b = bytearray(raw)
    for _ in range(draw(st.integers(0, 4))):
        if b: b[draw(st.integers(0, len(b)-1))] = draw(st.integers(0, 255))
    how = draw(st.sampled_from(['as it is', 'as it is', 'cut', 'longer', 'nothing', 'noise']))
    if how == 'cut': b = b[:draw(st.integers(0, len(b)))]
    if how == 'longer': b += bytes(draw(st.integers(1, 500)))
    if how == 'noise': b = bytearray(draw(st.binary(max_size=200)))
    return bytes(b if how != 'nothing' else b'')


@st.composite
def broken(draw):
    "A record with something wrong in its headers, its signal files, or both"
    files, _ = draw(st.one_of(sound(), sound(), joined()))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(files)))
        what = draw(st.sampled_from(['text', 'text', 'text', 'bytes', 'gone', 'same']))
        if what == 'text' and name.endswith('.hea'): files[name] = draw(edited(files[name]))
        elif what == 'gone' and name != 'r.hea': del files[name]
        elif what == 'same': files[name] = files[draw(st.sampled_from(sorted(files)))]
        else: files[name] = draw(flipped(files[name]))
    return files, None


@st.composite
def big(draw):
    "Small files that ask for much: long lines, many lines, repeated segments, wild claims"
    k, n = draw(st.sampled_from([1000, 30_000, 200_000])), draw(st.integers(1, 10**9))
    many = lambda line: (line + '\n').encode()*min(k, 400_000//len(line))
    files = {'r.dat': bytes(draw(st.sampled_from([0, 1, 1000, 40_000]))), 's0.dat': bytes(2000), 's0.hea': b's0 1 100 1000\ns0.dat 16 200/mV 16 0 0 0 0 I\n'}
    rep = many('s0 1000').count(b'\n')
    files['r.hea'] = draw(st.sampled_from([
        b'r 1 100 100\n' + b'a'*k + b'.\n', b'r 1 100 100\nr.dat 16 200/' + b'm'*k + b'! 0\n', b'r'*k + b' 1 100\n', b'r 1 100 5 ' + b'1:'*k, b'r 1 100 100\nr.dat' + b' '*k + b'x\n',
        b'r 1 100 100\nr.dat 16 200/mV 16 0 0 0 0 ' + b'I '*k, b'#'*k + b'\nr 1 100 100\nr.dat 16 200/mV\n', b'\n'*k, b'r 1 ' + b'1'*k, b'r 1 100 100\nr.dat 16 200/mV' + b' 1'*k,
        f'r 1 100 {n}\nr.dat 516 200/mV 16 0 0 0 0 I\n'.encode(), f'r 1 100 {n}\nr.dat 80 200/mV 16 0 0 0 0 I\n'.encode(), f'r 1 100\nr.dat 80x{n} 200/mV 16 0 0 0 0 I\n'.encode(),
        f'r 1 {draw(st.sampled_from(["0.0000001", "0.001", "0.5", "999999999"]))} 1000\nr.dat 16 200/mV 16 0 0 0 0 I\n'.encode(), f'r {min(k, 30_000)} 100 1\n'.encode() + many('r.dat 16 200/mV'),
        f'r/{rep} 1 100 {rep*1000}\n'.encode() + many('s0 1000'), f'r/2 1 100 {1000+n}\ns0 1000\n~ {n}\n'.encode(), f'r/{rep} 1 100 {rep}\n'.encode() + many('r 1')]))
    return files, None


OPTIONS = st.fixed_dictionaries(dict(leads=st.sampled_from([None, None, LEADS, ('I',), ('aVF', 'V1', 'ECG')]), fs=st.sampled_from([None, None, 100, 250, 33.3]), missing=st.sampled_from(['error', 'nan']),
                                     derive=st.booleans(), highpass=st.sampled_from([None, None, None, .67]), lowpass=st.sampled_from([None, None, None, 15]), notch=st.sampled_from([None, None, None, 12.5])))
CASES = st.tuples(st.integers(0, 19).flatmap(lambda i: sound() if i in (7, 8) else joined() if i in (11, 13) else big() if i == 17 else broken()), OPTIONS)
NOISE = st.tuples(st.builds(lambda h, d: ({'r.hea': h, 'r.dat': d}, None), st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda s: s.encode('utf-8', 'replace'))), st.binary(max_size=100)), OPTIONS)


# ---- running them

class TooSlow(Exception): "A call took longer than `DEADLINE`"


def bound(files, fs):
    "Bytes that reading `files` at `fs` Hz may need: a fixed part, and so much a sample that they can hold, in the rows of all leads, at the new rate"
    held = sum(len(b) for name, b in files.items() if not name.endswith('.hea'))*4/3
    heads = sum(len(b) for name, b in files.items() if name.endswith('.hea'))
    gaps = 100 if any(b'/' in b.split(b'\n')[0] for name, b in files.items() if name.endswith('.hea')) else 1
    if any(b[:4] == b'fLaC' for b in files.values()): held = max(held, 1e5)
    return 24e6 + 60*heads + 64*held*gaps*(18 if fs is None else 18*5)


def guarded(f, limit):
    "`(outcome, problem, result, peak bytes, seconds)` of a call: the name of what it raised or 'read', and what must not be; memory is traced where there is a `limit`"
    def late(*_): raise TooSlow(f'more than {DEADLINE} s')
    signal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, DEADLINE); faulthandler.dump_traceback_later(10*DEADLINE, exit=True)      # the latter where even a signal is not heard
    t0 = time.perf_counter()
    if limit: tracemalloc.start()
    problem, outcome, result = None, 'read', None
    try: result = f()
    except (BadRecord, FileNotFoundError) as e: outcome = type(e).__name__
    except Exception as e: outcome = type(e).__name__; problem = f'{outcome}: {e} at ' + ' < '.join(f'{Path(s.filename).stem}:{s.name}' for s in reversed(traceback.extract_tb(e.__traceback__)[-3:]))
    finally: signal.setitimer(signal.ITIMER_REAL, 0); faulthandler.cancel_dump_traceback_later()
    peak, spent = tracemalloc.get_traced_memory()[1], time.perf_counter() - t0
    tracemalloc.stop()
    if limit and peak > limit: problem = problem or f'{peak/1e6:.0f} MB where {limit/1e6:.0f} MB are allowed'
    return outcome, problem, result, peak, spent


def right(read, want):
    "Are these the samples that were written?"
    return read is not None and read[0].shape == (1, len(want)) and np.allclose(read[0][0], want.astype(np.float32), rtol=1e-5, atol=1e-6, equal_nan=True)


def run_case(case, seen=None, trace=True):
    "The problems of a case, as text; adds outcomes and the largest peak and time to the Counter `seen`"
    (files, truth), o = case
    seen, problems = Counter() if seen is None else seen, []
    with tempfile.TemporaryDirectory() as d:
        for name, b in files.items(): (Path(d)/name).write_bytes(b)
        path, leads = Path(d)/'r', o['leads']
        def call(what, f, fs=None):
            outcome, problem, result, peak, spent = guarded(f, bound(files, fs) if trace else None)
            seen[what, outcome] += 1; seen['peak'] = max(seen['peak'], peak); seen['seconds'] = max(seen['seconds'], spent)
            if problem: problems.append(f'{what}: {problem}')
            return result
        h = call('read_header', lambda: read_header(path))
        leads = leads or [l for l in dict.fromkeys(map(lead_name, h.sig_name if h else ['I'])) if l] or ['I']
        r = call('read_ecg', lambda: read_ecg(path, **{**o, 'leads': leads}), o['fs'])
        if r and (r[0].dtype != np.float32 or len(r[0]) != len(leads) or np.isinf(r[0]).any()): problems.append('read_ecg: not [n_leads,n] float32 without infinity')
        prep = Preprocess(leads, 100, 50, stride=5000, pad=True, missing=o['missing'], derive=o['derive'], highpass=o['highpass'], lowpass=o['lowpass'], notch=o['notch'])
        w = call('Preprocess.windows', lambda: prep.windows(path), 100)
        if w is not None and (w.shape[1:] != (len(leads), 50) or not np.isfinite(w).all()): problems.append('Preprocess.windows: not finite [n,n_leads,50]')
        hashed = call('content_hash', lambda: content_hash(path))
        table = call('check_records', lambda: check_records(d, None if truth else prep), 100)
        if table is not None:
            call('report', lambda: report(table))
            mine = table[table.record == 'r']
            if len(mine) != 1 and 'r.hea' in files: problems.append('check_records: r is lost')
            if truth and (mine.verdict.iloc[0] == 'bad' or 'checksum' in mine.problems.iloc[0]): problems.append(f'check_records: a sound record is {mine.reasons.iloc[0]}')
            if truth and mine.content_hash.iloc[0] != hashed: problems.append('check_records: another hash')
        for l, want in (truth or {}).items():
            if not right(call('truth', lambda: read_ecg(path, [l])), want): problems.append(f'wrong samples in {l}')
    return problems


def fuzz(n, first_seed, strategy=CASES):
    "Run `n` different cases; `(outcomes, {problem: first case})`"
    seen, found, done, mine = Counter(), {}, set(), count(first_seed*10**6)

    def body(case):
        (files, _), options = case
        if seen['cases'] == n or (key := hash((tuple(sorted(files.items())), repr(sorted(options.items()))))) in done: return
        done.add(key); seen['cases'] += 1
        big = sum(map(len, files.values())) > 20_000
        for p in run_case(case, seen, trace=big or seen['cases'] % 4 == 0): found.setdefault(re.sub(r'\d+', '#', p)[:160], (p, case))
        if seen['cases'] % 1000 == 0: print(f'{seen["cases"]} cases, {len(found)} found', flush=True)

    while seen['cases'] < n:
        s = next(mine)
        some = settings(max_examples=min(n, 500), database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        seed(s)(some(given(NOISE if s % 10 == 9 else strategy)(body)))()
    return seen, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=1000); parser.add_argument('--seed', type=int, default=0); parser.add_argument('--save', help='pickle the cases found here')
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter('ignore')
    t0 = time.perf_counter()
    seen, found = fuzz(args.cases, args.seed)
    for (what, how), k in sorted((k, v) for k, v in seen.items() if isinstance(k, tuple)): print(f'  {what:20} {how:20} {k}')
    print(f'seed {args.seed}: {seen["cases"]} different cases in {time.perf_counter()-t0:.0f} s; largest peak {seen["peak"]/1e6:.0f} MB, slowest call {seen["seconds"]:.1f} s; {len(found)} found')
    for p, ((files, _), options) in found.values():
        print('FOUND', p, options, *(f'\n    {k}: {v[:300] if k.endswith(".hea") else f"{len(v)} bytes"}' for k, v in files.items()))
    if args.save: Path(args.save).write_bytes(pickle.dumps(found))
    return int(bool(found))


if __name__ == '__main__': sys.exit(main())
