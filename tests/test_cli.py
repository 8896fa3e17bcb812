"`ecg-pma` as a user runs it: in a process of its own, on files"
import subprocess

import pandas as pd, pytest

from fastai_ecg_pma.synth import synth_ptbxl


def ecg_pma(*args, cwd): return subprocess.run(['ecg-pma', *map(str, args)], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return synth_ptbxl(tmp_path_factory.mktemp('data')/'ecgs', n=60)


def test_demo_goes_through_with_a_bad_record_among_good_ones(folder, tmp_path):
    table = pd.read_csv(folder/'ptbxl_database.csv')
    cut = folder/f'{table.filename_lr[0]}.dat'
    cut.write_bytes(cut.read_bytes()[:100])
    r = ecg_pma('demo', '--data', folder, '--out', 'out', '--pretrain-epochs', 1, '--frozen-epochs', 1, '--tune-epochs', 1, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert '1 set aside' in r.stdout and 'cut short' in r.stdout
    for name in ('random encoder', 'last layer', 'PPA', 'static', 'PMA', 'fine-tuned', 'macro-AUROC', 'labelled'): assert name in r.stdout, name
    scores = pd.read_csv(tmp_path/'out'/'scores.csv')
    assert len(scores) == 7 and ((scores.low <= scores.point) & (scores.point <= scores.high)).all()
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'cache', 'encoder', 'gates.png', 'layers.csv', 'layers.png', 'model.pkl', 'readouts.png', 'reconstruction.png', 'run.yaml', 'scores.csv'}
    assert 'Traceback' not in r.stderr and 'Warning' not in r.stderr.replace('RecordsSetAside', ''), r.stderr


@pytest.mark.parametrize('args,says', [
    (['--data', 'nowhere'], 'no such folder'),
    (['--data', '{folder}', '--task', 'super'], 'choose one of'),
    (['--data', '{folder}', '--size', 'huge'], 'tiny, small, base'),
    (['--data', '{empty}'], 'ptbxl_database.csv is missing'),
    (['--data', '{gone}'], 'the table names are not in')])
def test_what_cannot_be_done_is_said_in_one_line(folder, tmp_path, args, says):
    (tmp_path/'empty').mkdir(); (tmp_path/'gone').mkdir()
    for f in ('ptbxl_database.csv', 'scp_statements.csv'): (tmp_path/'gone'/f).write_bytes((folder/f).read_bytes())
    args = [a.format(folder=folder, empty=tmp_path/'empty', gone=tmp_path/'gone') for a in args]
    r = ecg_pma('demo', *args, cwd=tmp_path)
    assert r.returncode == 1 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr


def test_wrong_usage(tmp_path):
    assert ecg_pma(cwd=tmp_path).returncode == 2
    assert ecg_pma('dance', cwd=tmp_path).returncode == 2
    assert ecg_pma('demo', '--epochz', 3, cwd=tmp_path).returncode == 2
    assert '--data' in ecg_pma('demo', '--help', cwd=tmp_path).stdout
