"`ecg-pma` as a user runs it: in a process of its own, on files, in a terminal, interrupted"
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from importlib import import_module

import pandas as pd, pytest, torch, yaml
from safetensors.torch import load_file

from fastai_ecg_pma.cli import VERBS, main
from fastai_ecg_pma.config import Args, Key
from fastai_ecg_pma.ptbxl import ptbxl_table
from fastai_ecg_pma.synth import synth_ptbxl

ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}


def ecg_pma(*args, cwd, env=ENV): return subprocess.run(['ecg-pma', *map(str, args)], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)


@pytest.fixture
def here(capsys, monkeypatch):
    "The same without a process of its own, which takes seconds to begin"
    def run(*args, cwd):
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        with warnings.catch_warnings(): code = main([*map(str, args)])
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())
    return run


def good(*args, cwd, code=0):
    "Run a verb; what it printed, or with `--json` the object"
    r = ecg_pma(*args, cwd=cwd)
    assert r.returncode == code and 'Traceback' not in r.stderr, (args, r.stdout[-2000:], r.stderr[-3000:])
    return json.loads(r.stdout) if '--json' in args else r.stdout


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with 100 made-up ECGs, one of them cut short"
    home = tmp_path_factory.mktemp('home')
    cut = synth_ptbxl(home/'ecgs', n=100)/'records100/00000/00003_lr.dat'
    cut.write_bytes(cut.read_bytes()[:100])
    return home


@pytest.fixture(scope='module')
def encoder(home):
    "Pretrained from a file that `config` wrote, with a key of the command line over it"
    (home/'run.yaml').write_text(good('config', 'pretrain', 'ecgs', 'epochs=5', 'bs=32', cwd=home))
    out = good('pretrain', '--config', 'run.yaml', 'epochs=2', 'task=superdiagnostic', '--probe-every', 2, 'out=pre', cwd=home)
    assert 'epoch 2 of 2: train_loss' in out and '1 records set aside' in out and 'next: ecg-pma train ecgs' in out
    return home/'pre'/'encoder'


@pytest.fixture(scope='module')
def model(home, encoder):
    r = good('train', 'ecgs', f'arch={encoder}', 'readout=PMA(reads="mean")', 'epochs=1', 'calibration=null', 'thresholds={specificity: 0.8}', 'out=tuned', '--json', cwd=home)
    assert r['score']['n_classes'] == 4 and r['model'] == 'tuned/model' and r['gate']
    return home/'tuned'/'model'


# ---- each verb, on files

def test_pretrain_leaves_all_that_it_takes_to_remake_it(home, encoder):
    assert {p.name for p in (home/'pre').iterdir()} == {'checkpoints', 'config.yaml', 'encoder', 'layers.csv', 'layers.png', 'log.csv', 'reconstruction.png', 'result.json', 'run.yaml'}
    told, facts = (yaml.safe_load((home/'pre'/f).read_text()) for f in ('config.yaml', 'run.yaml'))
    assert told['verb'] == 'pretrain' and told['fit']['epochs'] == 2 and told['data']['bs'] == 32 and told['seed'] == 0 and told['data']['prep']['fs'] == 100
    assert facts['versions']['torch'] == torch.__version__.split('+')[0] or facts['versions']['torch'] == torch.__version__
    assert facts['command'].endswith('out=pre') and facts['begun'] and 'git' in facts
    log = pd.read_csv(home/'pre'/'log.csv')
    assert log.epoch.tolist() == [0, 1] and log.valid_loss.notna().all()


def test_the_configuration_that_was_saved_gives_the_same_weights(home, encoder):
    good('pretrain', '--config', 'pre/config.yaml', 'out=twin', cwd=home)
    a, b = (load_file(home/d/'encoder'/'model.safetensors') for d in ('pre', 'twin'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_run_in_the_same_folder_is_refused(home, encoder, here):
    r = here('pretrain', '--config', 'pre/config.yaml', 'lr=0.01', cwd=home)
    assert r.returncode == 1 and 'fit.lr was 0.001 and is 0.01 now' in r.stderr


def test_evaluate_agrees_with_training(home, model):
    trained = json.loads((model.parent/'result.json').read_text())['score']
    r = good('evaluate', '--model', model, '--data', 'ecgs', '--fold', 9, '--out', 'scored', '--json', cwd=home)
    assert abs(r['score']['point'] - trained['point']) < 1e-6 and r['score']['n_patients'] == trained['n_patients'] and r['bad'] == []
    said = pd.read_csv(home/'scored'/'predictions.csv')
    assert len(said) == trained['n_records'] and 'scored: test' in (home/'scored'/'protocol.yaml').read_text()
    every = good('evaluate', model, 'ecgs', 'fold=1,2,3,4,5,6,7,8,9,10', '--json', cwd=home, code=3)
    assert [b['record'] for b in every['bad']] == ['records100/00000/00003_lr'] and every['score']['n_records'] == 99


def test_evaluate_a_folder_with_a_table(home, model, here):
    t = ptbxl_table(home/'ecgs')
    labels = json.loads((model/'config.json').read_text())['labels']
    t.assign(**{l: [i % 2 for i in range(len(t))] for l in labels}).drop(columns='scp_codes').to_csv(home/'t.csv', index=False)
    r = good('evaluate', model, 'ecgs', 'source=wfdb', 'table=t.csv', 'path_col=filename_lr', 'fold_col=strat_fold', 'fold=9,10', '--json', cwd=home)
    assert r['score']['n_records'] == t.strat_fold.isin([9, 10]).sum()
    r = here('evaluate', model, 'ecgs', 'source=wfdb', 'table=t.csv', 'path_col=nope', cwd=home)
    assert r.returncode == 1 and "no column 'nope'" in r.stderr


def test_predict(home, model, here):
    one = good('predict', model, 'ecgs/records100/00000/00001_lr', cwd=home)
    assert 'NORM' in one and 'gate' in one and 'layer 1' in one
    many = good('predict', model, 'ecgs/records100', 'out=said.csv', '--json', cwd=home, code=3)
    assert len(many['predictions']) == 100 and [b['record'] for b in many['bad']] == ['ecgs/records100/00000/00003_lr'] and 'cut short' in many['bad'][0]['reason']
    assert len(pd.read_csv(home/'said.csv')) == 100
    assert here('predict', model, home/'ecgs/records100', '--json', cwd=home).stdout.count(str(home/'ecgs')) >= 100
    shown = {f'NORM  {r["probability.NORM"]:.3f}' for r in many['predictions'] if r['record'].endswith('00001_lr')}
    assert len(shown) == 1 and shown.pop() in one
    r = here('predict', model, 'ecgs/records100/00000/00003_lr', cwd=home)
    assert r.returncode == 1 and 'cut short' in r.stderr


def test_probe_and_compare(home, encoder):
    r = good('probe', encoder, 'ecgs', 'n=50', 'probe=knn_probe', 'out=probed', '--json', cwd=home)
    assert len(r['layers']) == 9 and (home/'probed'/'layers.png').exists()
    r = good('compare', encoder, 'ecgs', 'readouts.epochs=1', 'n=50', "readouts.readouts={last layer: Last, gate: 'PMA(reads=\"mean\")'}", 'random=false', 'bs=16', 'out=compared', '--json', cwd=home)       # of data: there is no section test
    assert [q['readout'].split(' (')[0] for q in r['readouts']] == ['last layer', 'gate', 'best layer'] and (home/'compared'/'readouts.png').exists()


def test_doctor_cache_export_and_import(home, encoder, model):
    r = good('doctor', 'ecgs', 'out=checks.csv', '--json', cwd=home, code=3)
    assert (r['records'], r['good'], [b['record'] for b in r['bad']]) == (100, 99, ['records100/00000/00003_lr']) and len(pd.read_csv(home/'checks.csv')) == 100
    r = good('cache', 'ecgs', 'kept', '--json', cwd=home, code=3)
    assert r['records'] == 99
    assert 'epoch 1 of 1' in good('pretrain', 'ecgs', 'cache=kept', 'epochs=1', 'random_crop=true', 'seq_len=500', 'stride=500', 'out=cached', cwd=home)
    x = good('export', encoder, 'encoder.pth', '--json', cwd=home)
    i = good('import', x['file'], 'again', '--json', cwd=home)
    a, b = (load_file(home/d/'model.safetensors') for d in ('pre/encoder', 'again'))
    assert i['source']['schema'].startswith('ST-MEM') and all(torch.equal(a[k], b[k]) for k in a)
    assert good('export', model, 'model.onnx', '--json', cwd=home)['bytes'] == (home/'model.onnx').stat().st_size


def test_demo_goes_through_with_a_bad_record_among_good_ones(home, tmp_path):
    r = ecg_pma('demo', '--data', home/'ecgs', '--out', 'out', '--pretrain-epochs', 1, '--frozen-epochs', 1, '--tune-epochs', 1, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert '1 set aside' in r.stdout and 'cut short' in r.stdout
    for name in ('random encoder', 'last layer', 'PPA', 'static', 'PMA', 'fine-tuned', 'macro-AUROC', 'labelled'): assert name in r.stdout, name
    scores = pd.read_csv(tmp_path/'out'/'scores.csv')
    assert len(scores) == 7 and ((scores.low <= scores.point) & (scores.point <= scores.high)).all()
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'cache', 'encoder', 'gates.png', 'layers.csv', 'layers.png', 'model', 'readouts.png', 'reconstruction.png', 'run.yaml', 'scores.csv'}
    assert 'Traceback' not in r.stderr and r.stderr.count('\n') == r.stderr.count('warning: '), r.stderr


def test_quiet_is_quiet(home, encoder):
    r = ecg_pma('pretrain', '--config', 'pre/config.yaml', '--quiet', cwd=home)          # finished already
    assert (r.returncode, r.stdout) == (0, '') and r.stderr.startswith('warning: 1 of ') and r.stderr.count('\n') == 1


# ---- a terminal, and interruptions

def in_terminal(args, cwd, until=None, press=b'\x03'):
    "Run in a pseudo-terminal; once `until` is on the screen, `press` is typed. Exit code and all that was shown"
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe('ecg-pma', ['ecg-pma', *map(str, args)], {**ENV, 'TERM': 'xterm', 'COLUMNS': '120', 'LINES': '40'})
    seen, end = b'', time.monotonic() + 300
    while time.monotonic() < end:
        if not select.select([fd], [], [], 1)[0]: continue
        try: part = os.read(fd, 65536)
        except OSError: break                       # how Linux says that the other end is closed
        if not part: break
        seen += part
        if until and until in re.sub(rb'\x1b\[[0-9;?]*[A-Za-z]', b'', seen): os.write(fd, press); until = None
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', seen.decode())


def test_terminal_shows_rate_remaining_time_and_metrics(home):
    code, text = in_terminal(['pretrain', 'ecgs', 'epochs=3', 'bs=16', 'out=shown'], home)
    assert code == 0, text[-3000:]
    assert re.search(r'Pretraining, epoch 2 of 3, loss \d\.\d+ .*\d+/\d+ .*(/s|s each) 0:00:\d\d', text), text[-3000:]
    last = text[text.rindex('┏'):]
    assert 'train_loss' in last and len(re.findall(r'│ [012] +│ \d\.\d{4} +│', last)) == 3 and 'next: ecg-pma train' in last


def test_interrupted_twice_it_ends_with_the_same_weights(home):
    keys = ['pretrain', 'ecgs', 'epochs=4', 'bs=16']
    good(*keys, 'out=whole', cwd=home)
    code, text = in_terminal([*keys, 'out=broken'], home, until=b'epoch 2 of 4')                # Ctrl-C
    assert code == 130 and 'Stopping after this batch' in text and 'go on with: ecg-pma pretrain --config broken/config.yaml' in text, text[-2000:]
    p = subprocess.Popen(['ecg-pma', 'pretrain', '--config', 'broken/config.yaml'], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    for line in p.stdout:
        if 'epoch 3 of 4' in line: p.send_signal(signal.SIGTERM)                                # what a cluster does when time is up
    assert p.wait() == 143 and 'go on with' in p.stderr.read()
    good('pretrain', '--config', 'broken/config.yaml', cwd=home)
    a, b = (load_file(home/d/'encoder'/'model.safetensors') for d in ('whole', 'broken'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert pd.read_csv(home/'broken'/'log.csv').drop(columns='time').equals(pd.read_csv(home/'whole'/'log.csv').drop(columns='time'))


def test_stopped_before_training_it_says_so(home):
    code, text = in_terminal(['doctor', 'ecgs', 'n_workers=0'], home, until=b'Checking records')
    assert code in (130, 3)                                                                 # on a quick machine it was over before
    if code == 130: assert 'Nothing was trained yet' in text


def test_several_processes(home):
    "As on several GPUs, here on the CPU"
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--no-python', 'ecg-pma', 'pretrain', 'ecgs', 'epochs=1', 'bs=8', 'out=two'],
                       cwd=home, capture_output=True, text=True, env={**ENV, 'ACCELERATE_USE_CPU': 'true'})
    assert r.returncode == 0, r.stderr[-3000:]
    good('pretrain', 'ecgs', 'epochs=1', 'bs=16', 'out=one', cwd=home)
    a, b = (pd.read_csv(home/d/'log.csv') for d in ('one', 'two'))
    assert r.stdout.count('The encoder is in') == 1 and abs(a.train_loss - b.train_loss).max() < 1e-3 and abs(a.valid_loss - b.valid_loss).max() < 1e-3


# ---- what is written about keys

def unexplained(args, at=''):
    "Keys without a text, in each of its functions and in its sections"
    for source in args.funcs:
        for k,key in args.keys(source).items():
            if not isinstance(key, Key): yield from unexplained(key[0], f'{at}{k}.')
            elif not key.doc and at+k != 'values': yield at+k


@pytest.mark.parametrize('verb', [v for v in VERBS if v != 'config'])
def test_every_key_of_a_written_configuration_is_explained(verb):
    module, name, _ = VERBS[verb]
    assert not [*unexplained(Args(getattr(import_module(f'fastai_ecg_pma.{module}'), name)))]


# ---- wrong usage

def test_wrong_usage_of_each_verb(tmp_path, here):
    wrong = [[v, 'epohcs=3'] for v in VERBS if v != 'config'] + [['config'], ['config', 'pretrian'], ['config', 'train', 'size=1', 'bs=x'], [], ['dance'], ['train', '--config'], ['train', '--config', 'nowhere.yaml'],
             ['pretrain', 'x', 'y'], ['evaluate', 'm'], ['predict'], ['import', 'a'], ['cache', 'a'], ['probe'], ['compare', 'e'], ['export', 'm'], ['train', 'x', 'readout=os.system'], ['train', 'x', 'fit.epochs=']]
    for args, r in [(wrong[0], ecg_pma(*wrong[0], cwd=tmp_path)), *((a, here(*a, cwd=tmp_path)) for a in wrong)]: assert r.returncode == 2 and not r.stdout and 'Traceback' not in r.stderr and r.stderr.count('\n') == 1 and r.stderr.startswith('ecg-pma'), (args, r.stdout, r.stderr)
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_markup(home, here):
    r = here('pretrain', 'ecgs', 'epochs=1', 'bs=32', 'out=[/b]', cwd=home)
    assert r.returncode == 0 and 'The encoder is in [/b]/encoder' in r.stdout, r.stderr
    last = pd.read_csv(home/'[/b]'/'log.csv').iloc[-1]
    assert abs(json.loads((home/'[/b]'/'result.json').read_text())['valid_loss'] - last.valid_loss) < 1e-6


@pytest.mark.parametrize('args,says', [
    (['demo', '--data', 'nowhere'], 'no such folder'),
    (['demo', '--data', '{home}/ecgs', '--task', 'super'], 'choose one of'),
    (['demo', '--data', '{home}/ecgs', '--size', 'huge'], 'tiny, small, base'),
    (['pretrain', '{empty}'], 'ptbxl_database.csv is missing'),
    (['pretrain', '{gone}'], 'the table names are not in'),
    (['pretrain', '{home}/ecgs', 'out={home}'], 'holds other files'),
    (['pretrain', '{home}/ecgs', 'precision=float8'], 'one of float32'),
    (['pretrain', '{home}/ecgs', 'probe_every=1'], 'needs labels'),
    (['pretrain', '{home}/ecgs', 'log=[tensorbord]'], "log has 'tensorbord'"),
    (['train', '{home}/ecgs', 'thresholds={{sensitivty: 0.9}}'], 'one of {sensitivity: 0.9}'),
    (['train', '{home}/ecgs', 'calibration=plat'], "calibration is 'plat'"),
    (['pretrain', '{home}/ecgs', 'ps=7'], '7'),
    (['doctor', '{home}/ecgs', 'out=none/x.csv'], 'name a file in a folder'),
    (['train', '{home}/ecgs', 'arch=no/where'], 'no encoder at no/where'),
    (['train', '{home}/ecgs', 'arch=TSTplus'], 'TSTplus'),
    (['train', '{home}/ecgs', 'frozen=true'], 'name a pretrained one'),
    (['train', '{home}/ecgs', 'valid_folds=[1]'], 'fold 1 is asked for in training and in validation'),
    (['evaluate', '{home}/ecgs', '{home}/ecgs'], 'config.json'),
    (['predict', 'nowhere', 'x'], 'no folder at nowhere'),
    (['import', '{home}/ecgs/ptbxl_database.csv', 'x'], 'ptbxl_database.csv'),
    (['doctor', '{empty}'], 'no record in'),
    (['doctor', '{home}/ecgs', 'prep=mne'], "no preprocessing 'mne'"),
    (['cache', '{empty}', 'out'], 'no record in')])
def test_what_cannot_be_done_is_said_in_one_line(home, tmp_path, here, args, says):
    (tmp_path/'empty').mkdir(); (tmp_path/'gone').mkdir()
    for f in ('ptbxl_database.csv', 'scp_statements.csv'): (tmp_path/'gone'/f).write_bytes((home/'ecgs'/f).read_bytes())
    r = here(*[a.format(home=home, empty=tmp_path/'empty', gone=tmp_path/'gone') for a in args], cwd=tmp_path)
    said = [l for l in r.stderr.splitlines() if not l.startswith('warning: ')]
    assert r.returncode == 1 and len(said) == 1 and says in said[0] and 'Traceback' not in r.stderr, (r.returncode, r.stderr)
