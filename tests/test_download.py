"A download that is killed leaves nothing wrong behind, and the next one goes on from there"
import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest, wfdb

from fastai_ecg_pma.download import SUMS, check_files, download_db

CODE = 'import sys, wfdb; from fastai_ecg_pma.download import download_db; wfdb.set_db_index_url(sys.argv[1]); download_db("made/1.0", sys.argv[2], progress=False)'


class Slow(SimpleHTTPRequestHandler):
    "Sends every file in pieces, with pauses"
    asked = Counter()
    def log_message(self, *a): pass
    def copyfile(self, source, outputfile):
        self.asked[self.path.split('/')[-1]] += 1
        while piece := source.read(5000): outputfile.write(piece); time.sleep(.004)


@pytest.fixture
def site(tmp_path):
    root = tmp_path/'site'/'made'/'1.0'
    (root/'a'/'b').mkdir(parents=True)
    names = [f'a/b/{i:02d}.dat' for i in range(40)]
    for n in names: (root/n).write_bytes(os.urandom(20_000))
    (root/SUMS).write_text(''.join(f'{hashlib.sha256((root/n).read_bytes()).hexdigest()} {n}\n' for n in names))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Slow, directory=tmp_path/'site'))
    Thread(target=server.serve_forever, daemon=True).start()
    wfdb.set_db_index_url(f'http://127.0.0.1:{server.server_port}')
    yield root, names, f'http://127.0.0.1:{server.server_port}'
    wfdb.set_db_index_url(); server.shutdown()


def test_killed_in_the_middle(site, tmp_path):
    root, names, url = site
    out = tmp_path/'out'
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CODE, url, str(out)])
    until = time.time() + 60
    while len(list(out.rglob('*.dat'))) < 8 and p.poll() is None and time.time() < until: time.sleep(.002)
    p.kill(); p.wait()
    have = [n for n in names if (out/n).exists()]
    assert 8 <= len(have) < 40
    assert all((out/n).read_bytes() == (root/n).read_bytes() for n in have)          # nothing half under a whole file's name
    assert sorted(check_files(out).file) == sorted(set(names) - set(have)) and set(check_files(out).reason) == {'missing'}
    Slow.asked.clear()
    table = download_db('made/1.0', out, progress=False)
    assert set(table.file[table.status == 'there']) == set(have)
    assert Slow.asked == Counter({SUMS: 1, **{n.split('/')[-1]: 1 for n in names if n not in have}})
    assert len(check_files(out)) == 0 and sorted(f.relative_to(out).as_posix() for f in out.rglob('*') if f.is_file()) == sorted([*names, SUMS])
