"Long work shows how far it is where somebody watches: in a real Jupyter kernel, and in whatever view a program sets"
import re
from contextlib import contextmanager

import pytest
from jupyter_client.manager import start_new_kernel

from fastai_ecg_pma import progress
from fastai_ecg_pma.cache import cache_ecg
from fastai_ecg_pma.compare import compare_readouts
from fastai_ecg_pma.doctor import check_records
from fastai_ecg_pma.learner import pretrain_learner
from fastai_ecg_pma.probe import probe_layers
from fastai_ecg_pma.progress import shown_by, track
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.synth import synth_ptbxl


def in_kernel(code):
    "What a kernel sends to the page while it runs `code`: `[(type of message, text)]`"
    manager, client = start_new_kernel(kernel_name='python3')
    try:
        request, out = client.execute(code), []
        while True:
            m = client.get_iopub_msg(timeout=120)
            kind, content = m['msg_type'], m['content']
            if kind in ('display_data', 'update_display_data'): out.append((kind, content['data'].get('text/html', '')))
            elif kind in ('stream', 'error'): out.append((kind, content.get('text') or '\n'.join(content.get('traceback', []))))
            elif kind == 'status' and content['execution_state'] == 'idle' and m['parent_header'].get('msg_id') == request: return out
    finally: client.stop_channels(); manager.shutdown_kernel(now=True)


def test_a_bar_in_jupyter():
    said = in_kernel('import time\nfrom fastai_ecg_pma.progress import track\nfor i in track(range(5), "Reading records", after=.2): time.sleep(.15)\nfor i in track(range(5), "Quick work"): pass\nprint("done")')
    bars = [t for k, t in said if k == 'update_display_data']
    assert any(re.search(r'value="3".*\[3/5 .*Reading records', t) for t in bars) and bars[-1] == ''          # gone when it is over
    assert said[-1] == ('stream', 'done\n') and not any('Quick' in t for _, t in said) and not any(k == 'error' for k, _ in said), said


@contextmanager
def recorded(monkeypatch):
    "The labels of all bars that are shown, from the first moment on"
    labels = []
    class Bar:
        def to(self, n, label=None): self.n = n
        def close(self, say=True): labels[self.i] = (*labels[self.i], self.n)
    class View:
        head = None
        def start(self, label, total, began):
            bar = Bar(); bar.i = len(labels)
            labels.append((label, total))
            return bar
    monkeypatch.setattr(track, '__defaults__', (None, None, 0, 0))          # `after` 0: nothing is too quick to be shown
    with shown_by(View()): yield labels


def test_all_long_work_tells(tmp_path, monkeypatch):
    folder = synth_ptbxl(tmp_path/'ecgs', n=60)
    with recorded(monkeypatch) as labels:
        dls = ptbxl_dls(folder, bs=16)
        n = len(dls.table)
        cache_ecg(folder, dls.table, tmp_path/'cache', 'filename_lr')
        check_records(folder)
        enc = pretrain_learner(dls, seed=0).encoder
        probe_layers(enc, dls, n=300)
        compare_readouts(enc, dls, epochs=1, n=10, best_layer=False)
    said = {l[0]: l[1:] for l in labels}
    assert said['Reading records'] == said['Caching records'] == (n, n) and said['Checking records'] == (60, 60)
    assert said['Probing layers'] == (9, 9) and said['Training read-outs'] == (5, 5) and {'Reading layers, batches', 'Resampling patients, blocks'} <= set(said)


def test_nothing_is_shown_where_nobody_watches(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(track, '__defaults__', (None, None, 0, 0))
    monkeypatch.setattr(progress, 'in_notebook', lambda: False)
    check_records(synth_ptbxl(tmp_path/'ecgs', n=5))
    assert capfd.readouterr() == ('', '')
    check_records(tmp_path/'ecgs', progress=True)
    assert 'Checking records: 5 of 5' in capfd.readouterr().err
    with shown_by(None): check_records(tmp_path/'ecgs', progress=True)           # quiet is quiet
    assert capfd.readouterr() == ('', '')


def test_what_is_tracked_comes_through_whole():
    with pytest.raises(ZeroDivisionError): list(track((1/(2-i) for i in range(4)), 'Dividing', 4))
    assert list(track(iter('abc'), 'Letters', show=True, after=0)) == ['a', 'b', 'c']
