"What the guides teach holds for more than they show: their classes, taken from the notebooks, at other sizes and in another process"
import json
import subprocess
import sys

import pytest, torch

from fastai_ecg_pma.aggregate import Last
from fastai_ecg_pma.contract import READOUT_CHECKS, check_model, check_readout
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.learner import pma_learner
from fastai_ecg_pma.records import Preprocess
from fastai_ecg_pma.saved import load_pma, save_pma
from fastai_ecg_pma.synth import simulate_ecg, write_record


def class_cells(root, guide, names):
    "Source of the guide's import cells and of the cells in which the classes `names` are made"
    cells = [''.join(c['source']) for c in json.loads((root/'nbs'/'howto'/f'{guide}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    imports = [c for c in cells if c.startswith('import torch')]
    made = [c for c in cells if any(c.startswith((f'class {n}(', f'class {n}:')) for n in names)]
    assert imports and made
    return '\n\n'.join([*imports, *(c.split('\n\nwrong =')[0] for c in made)])

@pytest.fixture(scope='module')
def mine_folder(root, tmp_path_factory):
    "A module `mymodels`, as a user would keep the classes of both guides"
    folder = tmp_path_factory.mktemp('mine')
    (folder/'mymodels.py').write_text(class_cells(root, 'add_readout', ['Agreement', 'Neighbours']) + '\n\n' + class_cells(root, 'add_backbone', ['Block']))
    return str(folder)

@pytest.fixture(scope='module')
def mine(mine_folder):
    sys.path.insert(0, mine_folder)
    try: yield __import__('mymodels')
    finally:
        sys.path.remove(mine_folder)
        sys.modules.pop('mymodels')

@pytest.fixture(scope='module')
def dls():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 12, 200, generator=rng).numpy(), torch.randint(0, 2, (24, 3), generator=rng).numpy()
    return ecg_dls(x, y, ['a', 'b', 'c'], [i >= 16 for i in range(24)], Preprocess(seq_len=200), bs=8)


@pytest.mark.parametrize('n_layers,d,n_leads', [(1, 8, None), (2, 32, None), (12, 64, None), (3, 16, 8)])
def test_the_guides_read_out_keeps_the_laws_at_any_size(mine, n_layers, d, n_leads):
    row = check_readout(mine.Agreement, n_layers, d, n_leads, known=[mine.Agreement])
    if n_layers == 1: assert row.pop('gradient') != 'yes'                       # one layer: there is nothing to weigh
    assert set(row.values()) == {'yes'} and set(row) >= set(READOUT_CHECKS) - {'gradient'}


def test_the_guides_broken_read_outs_are_told(mine):
    told = {c: {k for k, v in check_readout(getattr(mine, c), known=[getattr(mine, c)]).items() if v != 'yes'} for c in ('Neighbours', 'Forgets', 'Stuck')}
    assert told == dict(Neighbours={'alone', 'weights'}, Forgets={'moved', 'written'}, Stuck={'gradient', 'moved'})


def test_checking_leaves_no_trace_in_the_random_numbers(mine):
    torch.manual_seed(3)
    want = torch.rand(5)
    torch.manual_seed(3)
    check_readout(mine.Agreement)
    assert torch.equal(torch.rand(5), want)


@pytest.mark.parametrize('config', [dict(ps=25, d=16, n_layers=2, n_heads=2), dict(ps=100, d=48, n_layers=3, n_heads=3)])
def test_the_guides_backbone_keeps_the_contract_at_other_sizes(mine, dls, config):
    torch.manual_seed(0)
    model, blocks = mine.TimeFirst(seq_len=200, **config), [f'block{i}' for i in range(config['n_layers'])]
    row = check_model(dls, model, lambda m, x: m.tokens(x).transpose(0, 1), mine.Agreement, blocks=blocks)
    wrong = {k: v for k, v in row.items() if k not in ('layers', 'tokens', 'd', 'leads', 'overhead') and v != 'yes'}
    assert wrong == {} and (row['layers'], row['leads'], row['tokens']) == (len(blocks), 12, 12*200//config['ps'])


def test_named_layers_are_those_of_the_copy(mine, dls):
    "By name a copy is read, and the caller's model is left alone; modules of the caller's are refused"
    torch.manual_seed(0)
    model = mine.TimeFirst(seq_len=200, ps=50, n_layers=3)
    learn = pma_learner(dls, model, Last, blocks=['block0', 'block1', 'block2'], layers=[2])
    s, x = learn.model.backbone, torch.randn(2, 12, 200)
    assert s.encoder is not model and s.chosen == [2]
    h = model.embed(x)
    for b in (model.block0, model.block1): h = b(h)
    torch.testing.assert_close(s(x)[:, -1], h.mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='give their names'): pma_learner(dls, model, blocks=[model.block0, model.block1, model.block2])
    with pytest.raises(ValueError, match="no module 'block3'"): pma_learner(dls, model, blocks=['block0', 'block3'])


CODE = '''import sys; sys.path.insert(0, sys.argv[1])
import warnings; warnings.filterwarnings('ignore')
import mymodels
from fastai_ecg_pma.saved import load_pma
p = load_pma(sys.argv[2], known=[mymodels.Agreement, mymodels.TimeFirst])
print(*[repr(float(v)) for v in p.predict(sys.argv[3]).probability])'''

def test_what_the_guides_save_answers_in_another_process(mine, mine_folder, dls, tmp_path):
    torch.manual_seed(0)
    model = mine.TimeFirst(seq_len=200, ps=50, n_layers=3)
    learn = pma_learner(dls, model, mine.Agreement, blocks=['block0', 'block1', 'block2'], seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    save_pma(learn, tmp_path/'model', known=[mine.Agreement, mine.TimeFirst])
    write_record(simulate_ecg(seconds=2, rng=0), tmp_path/'ecg', 100)
    for known in ([], [mine.Agreement], [mine.TimeFirst]):
        with pytest.raises(ValueError): load_pma(tmp_path/'model', known=known)
    here = load_pma(tmp_path/'model', known=[mine.Agreement, mine.TimeFirst]).predict(tmp_path/'ecg').probability
    r = subprocess.run([sys.executable, '-c', CODE, mine_folder, str(tmp_path/'model'), str(tmp_path/'ecg')], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    there = [float(v) for v in r.stdout.split()]
    assert len(there) == 3 and there == pytest.approx(list(here), abs=1e-6)
