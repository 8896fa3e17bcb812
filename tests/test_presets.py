"Presets are what was measured, and what `ecg-pma train` takes"
from pathlib import Path

import pytest

from fastai_ecg_pma.cli import configure, main
from fastai_ecg_pma.presets import PRESETS

MEASURED = Path(__file__).parents[1]/'benchmarks'/'ptbxl_small'


@pytest.mark.parametrize('name,file', dict(default='hybrid', few='few').items())
def test_presets_are_the_recipes_that_were_measured(name, file): assert PRESETS[name] == (MEASURED/f'{file}.yaml').read_text()


@pytest.mark.parametrize('name', PRESETS)
def test_train_takes_a_preset_by_name_and_the_command_line_is_laid_over_it(name):
    c = configure('train', ['ecgs', '--config', name, 'seed=3', 'pretraining.fit.epochs=2']).check()
    assert c.values['model']['arch'] == 'EcgHybrid' and c.values['seed'] == 3 and c.values['pretraining']['fit']['epochs'] == 2 and c.values['data']['folder'] == 'ecgs'


def test_a_file_of_a_presets_name_is_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('default').write_text('seed: 7')
    assert configure('train', ['ecgs', '--config', 'default']).values['seed'] == 7


def test_other_verbs_and_names_refuse(capsys):
    assert main(['pretrain', 'ecgs', '--config', 'default']) == 2 and 'there is no' in capsys.readouterr().err
    assert main(['train', 'ecgs', '--config', 'defualt']) == 2 and 'no preset (default, few)' in capsys.readouterr().err
