"Broken records, made up by the hundred, and those that once broke something; `python tools/fuzz.py --cases 20000` tries more"
import io
import sys
import time
from pathlib import Path

import numpy as np, pytest, soundfile
from hypothesis import HealthCheck, Phase, given, settings

from fastai_ecg_pma.doctor import check_records
from fastai_ecg_pma.headers import BadRecord, read_header
from fastai_ecg_pma.records import Preprocess, read_ecg

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import fuzz

def some(n): return settings(max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))


OPTIONS = dict(leads=None, fs=100, missing='nan', derive=True, highpass=None, lowpass=None, notch=None)


@some(200)
@given(fuzz.CASES)
def test_broken_records(case): assert fuzz.run_case(case) == []


@some(100)
@given(fuzz.NOISE)
def test_noise_for_a_record(case): assert fuzz.run_case(case) == []


def flac(n, channels=1):
    out = io.BytesIO()
    soundfile.write(out, np.arange(n*channels, dtype=np.int16).reshape(n, channels), 100, format='FLAC')
    return out.getvalue()


def one(line='r.dat 16 200/mV 16 0 0 0 0 I', data=bytes(2000), head='r 1 100 1000'): return {'r.hea': f'{head}\n{line}\n'.encode(), 'r.dat': data}


S0 = {'s0.hea': b's0 1 100 1000\ns0.dat 16 200/mV 16 0 0 0 0 I\n', 's0.dat': bytes(2000)}
# what was found, and what is said of it now; None: it is read
FOUND = {
    'a line of letters, tried in every split': (one('a'*400_000), 'signal line of the header is not as WFDB asks'),
    'no ratio of integers between two rates': (one(head='r 1 200.123457 1000'), None),
    'a lead without samples beside one with': (one('r.dat 16x0 200/mV 16 0 0 0 0 I\nr.dat 16 200/mV 16 0 0 0 0 II', head='r 2 100 1000'), 'no sample in a frame'),
    'a kilobyte that asks for a gigabyte by a tiny rate': (one(head='r 1 0.01 1000'), None),
    'a short FLAC file of which much is promised': (one('r.dat 516 200/mV 16 0 0 0 0 I', flac(1000), 'r 1 100 90000000'), 'cut short: the header promises 90000000 samples a signal, it has 1000'),
    'no FLAC file of which much is promised': (one('r.dat 516 200/mV 16 0 0 0 0 I', head='r 1 100 90000000'), 'unreadable signal file'),
    'a comment with a byte that Unicode takes for the end of a line': ({**one(), 'r.hea': one()['r.hea'] + b'# und so weiter\x85 usw.\n'}, None),
    'a separator that only Python takes for a space': (one(head='r 1 100\x1f1000'), 'control characters'),
    'a NUL in a name': (one('r.dat 16 200/mV 16 0 0 0 0 I\x00'), 'control characters'),
    'a record that names itself as a segment, often': ({'r.hea': b'r/57142 1 100 57142\n' + b'r 1\n'*57142}, 'more than the 10000 allowed'),
    'a segment again and again': ({**S0, 'r.hea': b'r/2000 1 100 2000000\n' + b's0 1000\n'*2000}, 'is there 2000 times, more than the 100 allowed'),
    'a segment again and again, and holes': ({**S0, 'r.hea': b'r/20 1 100 910000\n' + b's0 1000\n~ 90000\n'*10}, 'less than a hundredth'),
    'signals without end': (one('r.dat 16 200/mV\n'*2000, head='r 2000 100 1'), 'more than the 512 allowed'),
}


@pytest.mark.parametrize('name', FOUND)
def test_found(name, tmp_path):
    files, said = FOUND[name]
    t0 = time.perf_counter()
    assert fuzz.run_case(((files, None), OPTIONS)) == []
    assert time.perf_counter() - t0 < 20
    for f, b in files.items(): (tmp_path/f).write_bytes(b)
    if said is None: assert read_header(tmp_path/'r').sig_len == 1000
    else:
        with pytest.raises(BadRecord, match=said): read_header(tmp_path/'r')


@pytest.mark.parametrize('head,said', [('r 1 200.123457 1000', 'cannot resample'), ('r 1 0.01 1000', 'more than 20 times as many samples as were recorded')])
def test_rates_that_cannot_be_had(head, said, tmp_path):
    for f, b in one(head=head).items(): (tmp_path/f).write_bytes(b)
    assert read_ecg(tmp_path/'r', ['I'])[0].shape == (1, 1000)
    for f in (lambda: read_ecg(tmp_path/'r', ['I'], fs=100), lambda: Preprocess(['I'])(tmp_path/'r')):
        with pytest.raises(BadRecord, match=said): f()


@pytest.mark.parametrize('fmt,spf,skews', [('16', (1, 1), (3, 0)), ('16', (1, 1), (3, 2)), ('16', (1, 4), (0, 3)), ('516', (1, 1), (0, 5)), ('516', (2, 2), (5, 2))])
def test_skews_shift_and_leave_a_hole(fmt, spf, skews, tmp_path):
    "wfdb 4.3.1 takes frames for samples at the end, cannot do two skews in a file, and has zeros where nothing was recorded"
    d = np.arange(1, 100*sum(spf)+1).reshape(100, -1)
    lines = [f'r.dat {fmt}x{s}:{k} 200/mV 16 0 0 0 0 {l}\n' for s, k, l in zip(spf, skews, ('I', 'II'))]
    (tmp_path/'r.hea').write_text('r 2 100 100\n' + ''.join(lines)); (tmp_path/'r.dat').write_bytes(fuzz.pack(fmt, d, spf))
    for lead, s, k, col in zip(('I', 'II'), spf, skews, np.split(d, [spf[0]], 1)):
        want = np.concatenate([col.reshape(-1)[k*s:]/200, np.full(k*s, np.nan)])
        np.testing.assert_array_equal(read_ecg(tmp_path/'r', [lead])[0][0], want.astype(np.float32))


def test_many_segments_are_listed_in_no_time(tmp_path):
    for i in range(20): (tmp_path/f'r{i}.hea').write_text('r/9000 1 100 9000\n' + ''.join(f's{j} 1\n' for j in range(9000)))
    t0 = time.perf_counter()
    assert check_records(tmp_path).verdict.tolist() == ['bad']*20
    assert time.perf_counter() - t0 < 60
