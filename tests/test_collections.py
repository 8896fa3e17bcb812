"The collections as they are on users' disks, their rules written a second time; skipped where they are not beside the project"
import ast
import csv
import re
from collections import Counter

import numpy as np, pandas as pd, pytest, wfdb

from fastai_ecg_pma.challenges import challenge_dls, challenge_labels, challenge_table, cinc2017_dls, cinc2017_table, ludb_labels, ludb_table
from fastai_ecg_pma.mitbih import AAMI, BEATS, DS1, mitbih_beats, mitbih_dls, mitbih_rhythms, mitbih_table
from fastai_ecg_pma.ptbxl import ptbxl_classes, ptbxl_labels, ptbxl_table
from fastai_ecg_pma.records import LEADS, Preprocess, read_ecg

# records of PTB-XL 1.0.3 with a label of the task, in folds 1-8, 9 and 10; in all for `all`, which drops nobody
GOLDEN = dict(all=21799, diagnostic=(17084, 2146, 2158), subdiagnostic=(17084, 2146, 2158), superdiagnostic=(17084, 2146, 2158), form=(7197, 901, 880), rhythm=(16832, 2100, 2098))


def kept(folder, task):
    "How many records of folds 1-8, 9 and 10 have a label"
    table = ptbxl_table(folder)
    has = ptbxl_labels(table, ptbxl_classes(folder, task))[0].any(1) | (task == 'all')
    return tuple(int((has & table.strat_fold.isin(f)).sum()) for f in (range(1, 9), [9], [10]))


@pytest.fixture(scope='module')
def whole_ptbxl(shared):
    "The folder of PTB-XL as it was published"
    for name in ('data/ptb-xl', 'data/ptb-xl-1.0.3', 'ptb-xl', 'ptb-xl-1.0.3'):
        try: folder = shared(name)
        except pytest.skip.Exception: continue
        if (folder/'ptbxl_database.csv').exists() and len(ptbxl_table(folder)) > 20000: return folder
    pytest.skip('the whole of PTB-XL is not beside the project (set ECG_PMA_SHARED)')


@pytest.mark.parametrize('task', GOLDEN)
def test_golden_counts_of_ptbxl(whole_ptbxl, task):
    got = kept(whole_ptbxl, task)
    assert (sum(got) if task == 'all' else got) == GOLDEN[task]


@pytest.mark.parametrize('name', ['ptb-xl', 'ptb-xl-z'])
@pytest.mark.parametrize('task', GOLDEN)
def test_records_that_ptbxl_tasks_keep(shared, name, task):
    "The rule behind the golden counts, by csv and set alone"
    folder = shared(f'data/{name}')
    with (folder/'scp_statements.csv').open() as f: st = {r['']: r for r in csv.DictReader(f)}
    column = dict(all=None, form='form', rhythm='rhythm').get(task, 'diagnostic')
    of_task = {s for s, r in st.items() if column is None or r[column] and float(r[column]) == 1}
    n = Counter()
    with (folder/'ptbxl_database.csv').open() as f:
        for r in csv.DictReader(f):
            if task == 'all' or of_task & set(ast.literal_eval(r['scp_codes'])): n[min(max(int(r['strat_fold']), 8), 10)] += 1
    assert kept(folder, task) == (n[8], n[9], n[10])
    assert n[8] > 0 < n[9]


def dx_lines(folder):
    "`{record: text of its Dx comment}`, by line and colon alone"
    return {p.stem: next(l.split(':')[1] for l in p.read_text().splitlines() if re.match(r'# ?Dx', l)) for p in folder.rglob('*.hea')}


def test_challenge_table(shared):
    folder = shared('data/cinc2020')
    table, dx = challenge_table(folder), dx_lines(folder)
    assert len(table) == len(dx) == 28 and len(table.attrs['bad']) == 0
    for r in table.itertuples():
        assert r.dx == dx[r.record].replace(' ', '').split(',')
        text = (folder/f'{r.path}.hea').read_text()
        assert re.search(rf'Age: {r.age:g}\n', text) and re.search(rf'Sex: {r.sex}(ale|emale)\n', text)
        assert r.seconds == int(text.split()[3])/500 and r.fs == 500
    assert Counter(table.source) == {'Georgia': 14, 'CPSC 2018 extra': 8, 'Chapman-Shaoxing and Ningbo': 4, 'PTB-XL': 2}


@pytest.mark.parametrize('year,absent', [(2020, 2), (2021, 2)])
def test_challenge_labels(shared, year, absent):
    folder = shared('data/cinc2020')
    table, dx = challenge_table(folder), dx_lines(folder)
    y, vocab = challenge_labels(table, year)
    col = lambda name: dict(zip(table.record, y[:, vocab.index(name)] == 1))
    has = lambda *codes: {r: any(re.search(rf'\b{c}\b', s) for c in codes) for r, s in dx.items()}
    assert col('CRBBB|RBBB') == has('713427006', '59118001') and sum(col('CRBBB|RBBB').values()) == 3
    assert col('PAC|SVPB') == has('284470004', '63593006') and sum(col('PAC|SVPB').values()) == 3
    assert col('PVC|VPB') == has('427172004', '17338001') and col('STach') == has('427084000') and col('SB') == has('426177001')
    assert col('LBBB' if year == 2020 else 'CLBBB|LBBB') == has('164909002', '733534002')
    assert (~y.any(1)).sum() == absent                        # E07505 (LVH) and HR20715 (ischaemia, LVH) have nothing that is scored


def test_challenge_dls(shared):
    dls = challenge_dls(shared('data/cinc2020'), lambda t: t.source == 'Georgia', prep=Preprocess(stride=1000))
    assert len(dls.bad) == 0 and dls.table.record.nunique() == 28 and len(dls.vocab) == 26
    assert dls.table.record[dls.table.valid].str.startswith('E').all() and not dls.table.record[~dls.table.valid].str.startswith('E').any()


def test_cinc2017(shared, tmp_path):
    folder = shared('data/cinc2017')
    table = cinc2017_table(folder)
    assert table.label.value_counts().to_dict() == {'N': 1490, 'O': 726, 'A': 210, '~': 74}
    with (folder/'REFERENCE.csv').open() as f: assert [[r, l] for r, l in zip(table.record, table.label)] == list(csv.reader(f))
    some = table.groupby('label').head(5)
    some[['record', 'label']].to_csv(tmp_path/'some.csv', header=False, index=False)
    dls = cinc2017_dls(folder, lambda t: np.arange(len(t)) % 4 == 0, reference=tmp_path/'some.csv')
    assert list(dls.vocab) == ['A', 'N', 'O', '~'] and len(dls.bad) == 0 and dls.table.record.nunique() == 20
    wins = [(r, -(-wfdb.rdheader(str(folder/r)).sig_len//300)) for r in some.record]
    assert all((dls.table.record == r).sum() == max(1, -(-s//10)) for r, s in wins)


def test_ludb_csv_says_what_its_headers_say(shared):
    "The same diagnoses are in the csv (case changed, line breaks in cells) and in comments of the headers"
    folder = shared('data/ludb')
    table = ludb_table(folder)
    assert len(table) == 60 and set(table.sex) == {'F', 'M'} and table.age.between(18, 90).all()
    for r in table.itertuples():
        says = [c.strip().rstrip('.').removeprefix('Rhythm: ').casefold() for c in wfdb.rdheader(str(folder/r.path)).comments[3:]]
        assert set(says) - {s.casefold() for s in r.statements} <= {''}, r.record
        assert {s.casefold() for s in r.statements} - set(says) <= {'pacemaker presence, undefined'}, r.record


def test_ludb_under_ptbxl_names(shared):
    folder = shared('data/ludb')
    table = ludb_table(folder)
    raw = {r['ID'].strip(): '\n'.join(v for k, v in r.items() if k not in ('ID', 'Sex', 'Age')).lower() for r in csv.DictReader((folder/'ludb.csv').open())}
    vocab = ['CD', 'HYP', 'MI', 'NORM', 'STTC', 'SR', 'AFIB', 'CRBBB', 'LVH', 'LAO/LAE', 'PAC', 'AMI']
    y, known = ludb_labels(table, vocab)
    got = {v: dict(zip(table.record, y[:, i] == 1)) for i, v in enumerate(vocab)}
    has = lambda *words: {k: any(re.search(w, s) for w in words) for k, s in raw.items()}
    assert got['CD'] == has('block', 'hemiblock', 'conduction delay') and got['HYP'] == has('hypertrophy', 'atrial overload')
    assert got['MI'] == has('^stemi', '\nstemi', 'scar formation') and got['STTC'] == has('(^|\n)ischemia')
    assert got['SR'] == has('sinus rhythm') and got['AFIB'] == has('fibrillation') and got['CRBBB'] == has('(^|\n)complete right') and got['LVH'] == has('left ventricular hypertrophy')
    assert got['LAO/LAE'] == has('left atrial (hypertrophy|overload)') and got['PAC'] == has(r'atrial extrasystole(?!: sa)')
    assert dict(zip(vocab, y.sum(0))) == dict(CD=27, HYP=51, MI=12, NORM=0, STTC=11, SR=42, AFIB=4, CRBBB=2, LVH=40, **{'LAO/LAE': 42}, PAC=3, AMI=0)
    open_mi, open_sttc = has('supp.nstemi', '(^|\n)ischemia'), has('supp.nstemi', 'non-specific repol', 'ventricular overload')
    for j, may in ((2, open_mi), (4, open_sttc)): assert dict(zip(table.record, known[:, j])) == {k: got[vocab[j]][k] or not may[k] for k in raw}
    assert not known[:, [3, 11]].any() and known[:, [0, 1, 5, 6, 7, 8, 9]].all()
    codes = set(pd.read_csv(shared('data/ptb-xl')/'scp_statements.csv', index_col=0).index)
    assert {c for row in table.codes for c in row} <= codes
    sup = ptbxl_classes(shared('data/ptb-xl'))
    for row, i in zip(table.codes, range(60)): assert {sup[c] for c in row if c in sup} <= {v for v, on in zip(vocab, y[i]) if on}
    assert {s.split(':')[0] for row in table.unmapped for s in row} == {'Electric axis of the heart'}
    assert read_ecg(folder/table.path[0], LEADS, 100)[0].shape == (12, 1000)


def test_mitbih_beats(shared):
    folder = shared('data/mitdb')
    table = mitbih_table(folder)
    assert table.record.tolist() == ['101', '119', '208'] and set(table.split) == {'DS1'} and all(l == ['MLII', 'V1'] for l in table.leads)
    beats = mitbih_beats(folder)
    for r in table.record:
        a = wfdb.rdann(str(folder/r), 'atr')
        assert Counter(beats.label[beats.record == r]) == Counter(AAMI[y] for s, y in zip(a.sample, a.symbol) if y in AAMI and 128 <= s <= 650000 - 128)
    assert beats.attrs['left_out'] == 3
    assert Counter(beats.label) == dict(N=1859 + 1543 + 1585, V=444 + 992, F=372, S=3 + 2, Q=2 + 2)
    raw = wfdb.rdrecord(str(folder/'208')).p_signal[:, 0]
    for r in beats[beats.record == '208'].iloc[::500].itertuples():
        w = raw[r.sample-128:r.sample+128]
        np.testing.assert_allclose(BEATS.window(BEATS.read(folder/'208'), r.start)[0], (w - w.mean())/(w.std() + 1e-8), atol=1e-4)


def test_mitbih_beats_at_another_rate(shared):
    "R peaks of normal beats stay in the middle of their windows"
    folder, prep = shared('data/mitdb'), Preprocess(('MLII',), 100, 60, 'none')
    beats, x = mitbih_beats(folder, prep), prep.read(folder/'101')
    w = np.stack([prep.window(x, s)[0] for s in beats.start[(beats.record == '101') & (beats.symbol == 'N')]])
    assert len(w) > 1800 and (np.abs(w.argmax(1) - 30) <= 3).mean() > .99


def test_mitbih_rhythms(shared):
    folder = shared('data/mitdb')
    wins = mitbih_rhythms(folder)
    assert (wins.record == '101').sum() == 181 and set(wins.label[wins.record == '101']) == {'N'}
    a = wfdb.rdann(str(folder/'119'), 'atr')
    marks = [(s, n.strip('\x00')) for s, y, n in zip(a.sample, a.symbol, a.aux_note) if y == '+']
    for w in wins[wins.record == '119'].itertuples():
        before = [n for s, n in marks if s/360 <= w.start/100] or [marks[0][1]]
        assert before[-1] == f'({w.label}' and not any(w.start/100 < s/360 < w.start/100 + 10 - 1e-6 for s, n in marks if n != f'({w.label}')
    assert len(mitbih_rhythms(folder, share=.6)) > len(wins)


def test_mitbih_of_one_part_alone_is_refused(shared):
    assert {'101', '119', '208'} <= set(DS1)
    with pytest.raises(ValueError, match='validation split is empty'): mitbih_dls(shared('data/mitdb'))
