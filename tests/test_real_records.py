"Real recordings through the real loader; skipped where they are not beside the project"
import ast

import numpy as np, pandas as pd, pytest, wfdb

from fastai_ecg_pma.doctor import check_records
from fastai_ecg_pma.headers import read_header
from fastai_ecg_pma.leads import lead_name
from fastai_ecg_pma.ptbxl import TASKS, ptbxl_classes, ptbxl_dls, ptbxl_labels, ptbxl_table
from fastai_ecg_pma.records import BadRecord, LEADS, PMA_LEADS, Preprocess, read_ecg


@pytest.mark.parametrize('name', ['ptb-xl', 'ptb-xl-z'])
def test_one_call_reads_them(shared, name):
    folder = shared(f'data/{name}')
    dls = ptbxl_dls(folder, n_workers=2)
    assert list(dls.vocab) == ['CD', 'HYP', 'MI', 'NORM', 'STTC'] and len(dls.bad) == 0
    row = dls.table[dls.table.valid].iloc[3]
    x = dls.valid_ds[3:4][0][0].numpy()
    raw = wfdb.rdrecord(str(folder/row.filename_lr)).p_signal.T       # PTB-XL's own order is LEADS' order
    want = (raw - raw.mean(1, keepdims=True))/(raw.std(1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(x, want, atol=1e-5)


@pytest.mark.parametrize('name', ['ptb-xl', 'ptb-xl-z'])
@pytest.mark.parametrize('task,n_classes', [('all', 71), ('diagnostic', 44), ('subdiagnostic', 23), ('superdiagnostic', 5), ('form', 19), ('rhythm', 12)])
def test_label_rules(shared, name, task, n_classes):
    "The rules of the published benchmark, written a second time"
    folder = shared(f'data/{name}')
    y, vocab = ptbxl_labels(ptbxl_table(folder), ptbxl_classes(folder, task))
    assert len(vocab) == n_classes
    st = pd.read_csv(folder/'scp_statements.csv', index_col=0)
    for row, codes in zip(y, pd.read_csv(folder/'ptbxl_database.csv').scp_codes):
        names = set(ast.literal_eval(codes))
        if TASKS[task]: names = {n for n in names if st.loc[n, TASKS[task]] == 1}
        if task == 'superdiagnostic': names = {st.loc[n, 'diagnostic_class'] for n in names}
        if task == 'subdiagnostic': names = {st.loc[n, 'diagnostic_subclass'] for n in names}
        assert {vocab[i] for i in np.flatnonzero(row)} == names


def test_500_hz_files_resampled_are_the_100_hz_files(shared):
    folder = shared('data/ptb-xl')
    table = pd.read_csv(folder/'ptbxl_database.csv')
    here = [r for r in table.itertuples() if (folder/f'{r.filename_hr}.hea').exists()]
    assert len(here) == 24
    for r in here:
        hi, lo = read_ecg(folder/r.filename_hr, fs=100)[0], read_ecg(folder/r.filename_lr)[0]
        assert hi.shape == lo.shape == (12, 1000)
        corr = [np.corrcoef(a[20:-20], b[20:-20])[0, 1] for a, b in zip(hi, lo)]
        assert min(corr) > .97, (r.ecg_id, corr)


def test_leads_by_name_on_another_device(shared):
    "LUDB writes its leads in lower case, at 500 Hz"
    folder = shared('data/ludb')
    path = sorted(folder.rglob('*.hea'))[0]
    x, fs = read_ecg(path, PMA_LEADS, fs=100)
    y, _ = read_ecg(path, LEADS, fs=100)
    assert x.shape == (12, 1000) and fs == 100
    np.testing.assert_array_equal(x[PMA_LEADS.index('V3')], y[LEADS.index('V3')])
    i, ii, iii = y[:3]
    assert np.corrcoef(ii, i + iii)[0, 1] > .9 > np.corrcoef(i, ii + iii)[0, 1]      # Einthoven: II = I + III, and no other way round


def test_wrong_leads_and_length_are_refused(shared):
    folder = shared('data/cinc2017')
    one = sorted(folder.glob('*.hea'))[0]
    with pytest.raises(BadRecord, match='none of I, II, .* is there, it has ECG'): Preprocess()(one)
    mit = sorted(shared('data/mitdb').glob('*.hea'))[0]
    with pytest.raises(BadRecord, match='expected 1000'): Preprocess(leads=['MLII'])(mit)


def ours(path):
    "Names, rate and samples of a whole record, as this library reads it"
    names = read_header(path).sig_name
    return names, *read_ecg(path, names)


@pytest.mark.parametrize('name,every,n,refused', [('cinc2020', 1, 28, ['E00009', 'E00015', 'E00018', 'E00793']), ('ludb', 1, 60, []), ('mitdb', 1, 3, []), ('ptb-xl', 4, 112, []), ('cinc2017', 20, 125, [])])
def test_equal_to_wfdb_where_wfdb_can(shared, name, every, n, refused):
    "To the bit; `refused` are the headers that wfdb 4.3.1 cannot read and this library can"
    paths = [p.with_suffix('') for p in sorted(shared(f'data/{name}').rglob('*.hea'))[::every]]
    assert len(paths) == n
    unread = []
    for p in paths:
        names, x, fs = ours(p)
        try: r = wfdb.rdrecord(str(p))
        except ValueError: unread.append(p.name); continue
        assert (names, fs) == (r.sig_name, r.fs)
        np.testing.assert_array_equal(x, r.p_signal.T.astype(np.float32))
    assert unread == refused


def test_every_record_of_the_2020_challenge_is_read_rightly(shared):
    "Against the bytes and the checksums, with a parser of three lines"
    for hea in sorted(shared('data/cinc2020').glob('*.hea')):
        head, *lines = [l.split() for l in hea.read_text().splitlines() if not l.startswith('#')]
        d = np.frombuffer(hea.with_suffix('.mat').read_bytes()[24:], '<i2').reshape(-1, 12).T
        assert d.shape == (int(head[1]), int(head[3])) and all(l[1] in ('16+24', '16x1+24') for l in lines)
        assert [int(v.sum()) % 65536 for v in d] == [int(l[6]) % 65536 for l in lines]
        gain = np.array([float(l[2].split('/')[0].split('(')[0]) for l in lines])
        names, x, fs = ours(hea)
        assert (names, fs) == ([l[8] for l in lines], int(head[2]))
        np.testing.assert_array_equal(x, (d/gain[:, None]).astype(np.float32))
        assert [lead_name(l) for l in names] == list(LEADS)
        assert (read_header(hea).mended != []) == (len(head) > 4)                     # the date; in four of them the name too


def test_what_the_doctor_says_of_them(shared):
    t = check_records(shared('data/cinc2020'))
    assert t.verdict.eq('good').all() and t.problems.str.contains('date').sum() == 14 and t.problems.str.contains('mended header').sum() == 4
    t = check_records(shared('data/ludb'))
    assert len(t) == 60 and t.reasons.eq('gain made up: every lead spans exactly 1 mV').all()
    t = check_records(shared('data/ptb-xl')/'records500')
    assert t[t.verdict != 'good'][['record', 'reasons']].values.tolist() == [['00000/00004_hr', 'saturated: V4 for 0.11 s']]
    assert check_records(shared('data/mitdb'), Preprocess(['MLII'], stride=1000)).verdict.tolist() == ['good']*3
