"Augmentations in the learners of this library: in training alone, and through export"
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.learner import load_learner

from fastai_ecg_pma.augment import BaselineWander, LeadCutMix, LeadDropout, LeadMixUp, Noise, Scale, Shift, Stretch, TimeMask
from fastai_ecg_pma.data import ecg_dls
from fastai_ecg_pma.learner import evaluate, pma_learner, predict_record, pretrain_learner
from fastai_ecg_pma.ptbxl import ptbxl_dls
from fastai_ecg_pma.synth import synth_ptbxl
from fastai_ecg_pma.vit1d import ViT1d


def tfms(): return [Shift(20), Stretch(), Scale(), BaselineWander(100), Noise(), LeadDropout(), TimeMask(), LeadCutMix(), LeadMixUp()]

class Seen(Callback):
    "Keeps what the model is given; comes after MaskPatches (11)"
    order = 20
    def before_fit(self): self.trained,self.valid = [],[]
    def before_batch(self): (self.trained if self.training else self.valid).append([o.detach().clone().as_subclass(torch.Tensor) for o in (*self.xb, *self.yb)])

def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return synth_ptbxl(tmp_path_factory.mktemp('data')/'ecgs', n=40)

@pytest.fixture(scope='module')
def plain(folder): return ptbxl_dls(folder, bs=16)

@pytest.fixture(scope='module')
def dls(folder): return ptbxl_dls(folder, bs=16, batch_tfms=tfms())


def fit(learn, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn.seen


def test_training_sees_them_and_validation_does_not(dls, plain, folder, tmp_path):
    learn = pma_learner(dls, ps=125, seed=0, cbs=Seen(), path=tmp_path)
    seen = fit(learn)
    n = len(dls.train)
    assert not same(seen.trained[:n], seen.trained[n:])
    y = torch.cat([b[1] for b in seen.trained])
    assert ((y > 0) & (y < 1)).any() and y.min() >= 0 and y.max() <= 1
    assert same([[o.as_subclass(torch.Tensor) for o in b] for b in plain.valid]*2, seen.valid)
    other = pma_learner(plain, ps=125, seed=0)
    other.model.load_state_dict(learn.model.state_dict())
    with learn.no_bar(), other.no_bar():
        assert learn.validate() == other.validate()
        assert torch.equal(learn.get_preds()[0], other.get_preds()[0])
    assert evaluate(learn) == evaluate(other)
    path = folder/dls.table.filename_lr[0]
    learn.remove_cb(Seen)
    learn.export('aug.pkl')
    back = load_learner(tmp_path/'aug.pkl')
    assert predict_record(back, path).equals(predict_record(learn, path))
    with back.no_bar(), learn.no_bar(): assert torch.equal(back.get_preds(dl=back.dls.valid.new_dl(dls.valid_ds[:][0]))[0], learn.get_preds()[0])


def test_the_same_seed_trains_the_same_model(folder):
    def train():
        learn = pma_learner(ptbxl_dls(folder, bs=16, batch_tfms=tfms()), ps=125, seed=3, cbs=Seen())
        return fit(learn, 1).trained, learn.model.state_dict()
    (a, v), (b, w) = train(), train()
    assert same(a, b) and all(torch.equal(v[k], w[k]) for k in v)


@pytest.mark.parametrize('labelled', [True, False])
def test_pretraining(dls, plain, labelled):
    if not labelled:
        X = torch.cat([torch.as_tensor(np.asarray(ds[:][0])) for ds in (plain.train_ds, plain.valid_ds)]).numpy()
        dls,plain = (ecg_dls(X, None, None, np.arange(len(X)) >= len(plain.train_ds), plain.prep, bs=16, batch_tfms=t) for t in (tfms(), None))
    learn, other = (pretrain_learner(d, seed=0, cbs=Seen()) for d in (dls, plain))
    seen, n = fit(learn), len(dls.train)
    assert not same([b[:1] for b in seen.trained[:n]], [b[:1] for b in seen.trained[n:]])
    assert np.isfinite(learn.recorder.losses).all()
    assert same(seen.valid, fit(other).valid)
    other.model.load_state_dict(learn.model.state_dict())
    with learn.no_bar(), other.no_bar(): assert learn.validate() == other.validate()
    assert all(torch.equal(a, b) for a,b in zip(learn.rebuild(), other.rebuild()))


def test_a_vit_that_standardises_patches_hardly_sees_scale():
    torch.manual_seed(0)
    enc, x = ViT1d(1000, 50).eval(), torch.randn(2, 12, 1000)
    with torch.no_grad(): assert (enc(x) - enc(2*x)).abs().max() < 1e-3*enc(x).abs().max() < (enc(x) - enc(x + torch.randn_like(x))).abs().max()
