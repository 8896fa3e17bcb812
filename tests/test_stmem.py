"Files under ST-MEM's and PMA's names: every key accounted for, written back bit by bit, any leads, and files that claim what is not so"
import json
import os
import pickle
import warnings
from copy import deepcopy
from hashlib import sha256

import numpy as np, pytest, torch
from torch.nn.functional import gelu, layer_norm, linear

from fastai_ecg_pma import stmem
from fastai_ecg_pma.aggregate import PPA, FusedModel, Last, ReadOut, Static, mlp_head
from fastai_ecg_pma.encoder import find_encoder
from fastai_ecg_pma.gate import PMA
from fastai_ecg_pma.layers import LayerStack
from fastai_ecg_pma.leads import LEADS, PMA_LEADS
from fastai_ecg_pma.mae import MAE
from fastai_ecg_pma.masking import masked_mse, patchify
from fastai_ecg_pma.predict import Predictor
from fastai_ecg_pma.saved import load_pma
from fastai_ecg_pma.records import PREPROCESS, Preprocess
from fastai_ecg_pma.stmem import PartialLoad, load_original_pma, load_stmem_mae, save_stmem
from fastai_ecg_pma.vit1d import ViT1d
from fastai_ecg_pma.weights import load_encoder, save_encoder

KINDS = {'encoder': 'ST-MEM encoder', 'pretrain': 'ST-MEM pretraining', 'pma': 'PMA'}


@pytest.fixture
def folder(shared): return shared('fixtures')


@pytest.fixture
def file(folder): return lambda kind: folder/f'twelve_lead_{kind}.pth'


@pytest.fixture
def arrays(folder): return np.load(folder/'twelve_lead.npz')


def raw(path): return torch.load(path, weights_only=True)['model']


def agree(a, b): torch.testing.assert_close(a, torch.from_numpy(b) if isinstance(b, np.ndarray) else b, rtol=0, atol=1e-10, check_dtype=False)


def same_file(a, b):
    for v in a.values(): assert v.is_contiguous() and v.untyped_storage().nbytes() == v.numel()*v.element_size()         # no views of something larger
    assert list(a) == list(b)                                    # their order, too
    for k in a: assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].contiguous().numpy().tobytes() == b[k].contiguous().numpy().tobytes(), k


# the account

@pytest.mark.parametrize('kind,ignored', [('encoder', {}), ('pretrain', dict(decoder=32, again=6)), ('pma', dict(gate=8, head=14))])
def test_every_key_is_accounted_for(file, kind, ignored):
    enc = load_encoder(file(kind))
    a, state = enc.account, raw(file(kind))
    assert a.ok and not (a.missing or a.unexpected or a.wrong_shape or a.wrong_values)
    assert sorted([*a.mapped, *a.ignored]) == sorted(state)
    assert len(a.mapped) == len(raw(file('encoder'))) and len(a.ignored) == sum(ignored.values())
    assert {b.partition('[')[0] for b in a.mapped.values()} == set(enc.state_dict())
    for theirs, ours in a.mapped.items():
        name, _, row = ours.partition('[')
        t = enc.state_dict()[name]
        assert torch.equal(t[int(row[:-1])] if row else t, state[theirs].squeeze(0) if name == 'pos' else state[theirs])
    assert enc.source == dict(file=file(kind).name, sha256=sha256(file(kind).read_bytes()).hexdigest(), schema=KINDS[kind])
    assert enc.prep is None
    text = str(a)
    assert f'{len(a.mapped)} mapped' in text and '0 missing' in text and f'{len(a.ignored)} ignored' in text
    assert sorted(a.table()['in the file']) == sorted(state)


def test_the_whole_of_a_pma_and_of_a_pretraining_file_is_used(file):
    a = load_original_pma(file('pma')).account
    assert a.ok and set(a.mapped) == set(raw(file('pma'))) and not a.ignored
    m = load_stmem_mae(file('pretrain'))
    assert m.account.ok and set(m.account.mapped) == set(raw(file('pretrain'))) - set(m.account.ignored)
    assert set(m.account.ignored.values()) == {'second patch embedding'} and len(m.account.ignored) == 6
    assert m.account == m.encoder.account and m.source == m.encoder.source


def test_pma_answers_by_the_names_of_leads(file, arrays, folder):
    m = load_original_pma(file('pma'))
    assert not any(s.training for s in m.modules())
    assert m.backbone.encoder.known_leads == list(PMA_LEADS) and load_original_pma(file('pma'), LEADS).backbone.encoder.known_leads == list(LEADS)
    assert load_encoder(file('pma')).known_leads == list(PMA_LEADS) and load_encoder(file('pretrain')).known_leads == list(LEADS)
    m, x = m.double().requires_grad_(False), torch.from_numpy(arrays['x']).double()
    agree(m(x), arrays['pma_logits'])
    agree(m.weights(x), arrays['pma_gates'])
    assert m(x).shape[1] == json.loads((folder/'twelve_lead.json').read_text())['num_classes']
    by_name = load_original_pma(file('pma')).double().requires_grad_(False)             # the same records, their leads in another order
    by_name.backbone.encoder.use_leads(LEADS)
    agree(by_name(x[:, [PMA_LEADS.index(l) for l in LEADS]]), arrays['pma_logits'])


def test_copies_keep_where_they_come_from(file, tmp_path):
    enc = load_encoder(file('encoder'))
    for e in (deepcopy(enc), pickle.loads(pickle.dumps(enc))): assert (e.source, e.account) == (enc.source, enc.account)
    save_encoder(enc, tmp_path/'enc')
    assert all(torch.equal(v, enc.state_dict()[k]) for k, v in load_encoder(tmp_path/'enc').state_dict().items())


# there and back

@pytest.mark.parametrize('kind,load', [('encoder', load_encoder), ('pretrain', load_stmem_mae)])
def test_loaded_and_saved_is_bit_equal(file, tmp_path, kind, load):
    same_file(raw(save_stmem(load(file(kind)), tmp_path/'a.pth')), raw(file(kind)))
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_encoder_of_a_pretraining_file_gives_the_encoder_file(file, tmp_path):
    same_file(raw(save_stmem(load_stmem_mae(file('pretrain')).encoder, tmp_path/'a.pth')), raw(file('encoder')))


def test_the_second_patch_embedding_is_written_after_training_too(file, tmp_path):
    m = load_stmem_mae(file('pretrain'))
    x, mask = torch.randn(2, 12, m.encoder.seq_len), torch.rand(2, 12, m.encoder.n_patches) < .5
    masked_mse(m(x, mask), patchify(x, m.ps), mask).backward()
    torch.optim.SGD(m.parameters(), 1.).step()
    state, before = raw(save_stmem(m, tmp_path/'a.pth')), raw(file('pretrain'))
    for i in (1, 2, 3):
        k = f'to_patch_embedding.{i}.weight'
        assert torch.equal(state[k], state['encoder.'+k]) and not torch.equal(state[k], before[k])
    m2 = load_stmem_mae(tmp_path/'a.pth')
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in m2.state_dict().items())


def test_double_stays_double_and_a_failed_save_leaves_what_was_there(file, tmp_path, monkeypatch):
    enc, path = load_encoder(file('encoder')), tmp_path/'a.pth'
    assert {v.dtype for v in raw(save_stmem(enc.double(), path)).values()} == {torch.float64}
    was = path.read_bytes()
    def full(obj, f): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(stmem.torch, 'save', full)
    with pytest.raises(OSError): save_stmem(enc, path)
    assert path.read_bytes() == was and len(list(tmp_path.iterdir())) == 1


# leads: an encoder in a few lines, from the file's own names

def tokens(state, x, rows):
    "`[bs,k,seq_len]`, of lead embeddings `rows` -> `[bs,k,n+2,d]`"
    g = lambda k: state[k]
    d = g('sep_embedding').shape[0]
    p = x.unflatten(-1, (-1, g('to_patch_embedding.1.weight').shape[0]))
    p = layer_norm(p, p.shape[-1:], g('to_patch_embedding.1.weight'), g('to_patch_embedding.1.bias'))
    p = layer_norm(linear(p, g('to_patch_embedding.2.weight'), g('to_patch_embedding.2.bias')), (d,), g('to_patch_embedding.3.weight'), g('to_patch_embedding.3.bias'))
    s = g('sep_embedding').expand(*p.shape[:2], 1, d)
    return torch.cat([s, p, s], 2) + g('pos_embedding')[:, None] + torch.stack([g(f'lead_embeddings.{r}') for r in rows])[None, :, None]


def layers(state, h, n_layers=4):
    "Tokens `[bs,n,d]` and what each block makes of them"
    yield h
    for i in range(n_layers):
        g = lambda k: (state[f'block{i}.{k}.weight'], state[f'block{i}.{k}.bias'])
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in linear(layer_norm(h, h.shape[-1:], *g('attn.norm')), *g('attn.fn.to_qkv')).chunk(3, -1))
        h = h + linear(((q@k.mT/8).softmax(-1)@v).transpose(1, 2).flatten(2), *g('attn.fn.to_out.0'))
        h = h + linear(gelu(linear(layer_norm(h, h.shape[-1:], *g('ff.norm')), *g('ff.fn.net.0'))), *g('ff.fn.net.3'))
        yield h


@pytest.mark.parametrize('names', [LEADS, PMA_LEADS, ('II',), ('V6',), ('aVF', 'I'), ('V1', 'aVR', 'II'), ('V5', 'V1', 'I', 'aVL', 'II', 'V3', 'III'), LEADS[::-1][:11]])
def test_any_leads_in_any_order(file, arrays, names):
    state = {k: v.double() for k, v in raw(file('encoder')).items()}
    enc = load_encoder(file('encoder')).double().requires_grad_(False).use_leads(names)
    rows = [LEADS.index(l) for l in names]
    x = torch.from_numpy(arrays['x']).double()[:, rows]
    got = list(enc.states(x))
    in_file = torch.from_numpy(arrays['hidden'])[:, 0].unflatten(1, (12, -1))[:, rows]
    agree(got[0], in_file.flatten(1, 2))                        # what enters block 1 knows of no other lead
    want = list(layers(state, tokens(state, x, rows).flatten(1, 2)))
    for a, b in zip(got, want, strict=True): agree(a, b)
    if names == LEADS:
        for l, h in enumerate(want): agree(h, arrays['hidden'][:, l])       # the few lines say what the original says
    if len(names) < 12:
        with pytest.raises(ValueError, match=f'{len(names)} leads'): enc(torch.from_numpy(arrays['x']).double())


def test_one_lead_is_not_twelve(file, arrays):
    x = torch.from_numpy(arrays['x']).float()
    for m in (load_encoder(file('encoder')), load_original_pma(file('pma'))):
        for k in (1, 3):
            with pytest.raises(ValueError, match=r'expected x of \[bs, 12 leads'): m(x[:, :k])
    enc = load_encoder(file('encoder')).use_leads(['V2'])
    with pytest.raises(ValueError, match='1 leads'): enc(x)
    with pytest.raises(ValueError, match='not trained on V7'): enc.use_leads(['V7'])


def test_names_go_with_the_rows(file):
    "`leads` says which row is which; `prep` which of them `x` has"
    a, b = load_encoder(file('encoder')), load_encoder(file('encoder'), PMA_LEADS)
    assert torch.equal(a.lead, b.lead)
    assert a.use_leads(['V1']).lead_idx == [6] and b.use_leads(['V1']).lead_idx == [2]
    c = load_encoder(file('encoder'), prep=Preprocess(('V1', 'I'), 250, 300))
    assert (c.leads, c.lead_idx, c.known_leads) == (['V1', 'I'], [6, 0], list(LEADS))
    with pytest.raises(ValueError, match='trained on 300 samples, prep reads 2250'): load_encoder(file('encoder'), prep=PREPROCESS['stmem'])
    for leads, what in ((LEADS[:3], 'holds 12 leads, 3 names'), ((*LEADS[:11], 'I'), 'asked for twice'), ('I', 'string')):
        with pytest.raises(ValueError, match=what): load_encoder(file('encoder'), leads)


# what does not fit. From here on no file from outside is needed

@pytest.fixture
def small(tmp_path):
    "A small encoder, its state under the published names, and a function that writes such states"
    torch.manual_seed(0)
    enc = ViT1d(200, 25, d=32, n_layers=2, n_heads=1).requires_grad_(False)
    for p in enc.parameters(): p.normal_()
    def write(state, **more): torch.save({'model': state, **more}, tmp_path/'x.pth'); return tmp_path/'x.pth'
    return enc, raw(save_stmem(enc, tmp_path/'small.pth')), write


def less(state, *names): return {k: v for k, v in state.items() if k not in names}


MISFITS = {'missing': (lambda s: less(s, 'norm.weight', 'block1.attn.fn.to_out.0.bias'), '2 missing: block1.attn.fn.to_out.0.bias, norm.weight'),
           'unexpected': (lambda s: s | {'cls_token': torch.ones(1)}, '1 unexpected: cls_token'),
           'a decoder without its encoder': (lambda s: s | {'decoder_norm.weight': torch.ones(32)}, '1 unexpected: decoder_norm.weight'),
           'another block': (lambda s: s | {'block1.ff.fn.net.6.weight': torch.ones(1)}, '1 unexpected: block1.ff.fn.net.6.weight'),
           'zero in front': (lambda s: s | {'block01.attn.norm.weight': torch.ones(32)}, '1 unexpected: block01.attn.norm.weight'),
           'shape': (lambda s: s | {'block0.ff.fn.net.0.weight': torch.ones(64, 32)}, r'1 wrong shape: block0.ff.fn.net.0.weight \(file \[64, 32\], model \[128, 32\]\)'),
           'axes': (lambda s: s | {'sep_embedding': torch.ones(1, 32)}, r'1 wrong shape: sep_embedding \(file \[1, 32\], model \[32\]\)'),
           'turned': (lambda s: s | {'lead_embeddings.4': torch.ones(32, 1)}, r'1 wrong shape: lead_embeddings.4'),
           'scalar': (lambda s: s | {'norm.bias': torch.tensor(1.)}, r'1 wrong shape: norm.bias \(file \[\]'),
           'heads that differ': (lambda s: s | {'block1.attn.fn.to_qkv.weight': torch.ones(384, 32)}, '1 wrong shape: block1.attn.fn.to_qkv.weight'),
           'nan': (lambda s: s | {'norm.bias': torch.full((32,), torch.nan)}, r'1 wrong values: norm.bias \(not finite\)'),
           'too large': (lambda s: s | {'norm.bias': torch.full((32,), 1e300, dtype=torch.float64)}, r'1 wrong values: norm.bias \(not finite\)'),
           'integers': (lambda s: s | {'norm.bias': torch.ones(32, dtype=torch.long)}, r'norm.bias \(int64\)'),
           'complex': (lambda s: s | {'norm.bias': torch.ones(32)+1j}, r'norm.bias \(complex64\)')}


@pytest.mark.parametrize('name', MISFITS)
def test_misfits_are_refused_unless_asked_for(small, name):
    enc, state, write = small
    change, says = MISFITS[name]
    path = write(change(state))
    with pytest.raises(ValueError, match=says) as e: load_encoder(path)
    assert 'partial=True' in str(e.value)
    torch.manual_seed(1); fresh = ViT1d(**enc.config).state_dict()
    torch.manual_seed(1)
    with pytest.warns(PartialLoad, match=says): part = load_encoder(path, partial=True)
    assert not part.account.ok and str(part.account) in str(e.value)
    rows = lambda s: {k: v for k, v in s.items() if k != 'lead'} | {f'lead[{i}]': v for i, v in enumerate(s['lead'])}
    fitted, got = set(part.account.mapped.values()), rows(part.state_dict())
    for k, v in got.items(): assert torch.equal(v, rows(enc.state_dict())[k] if k in fitted else rows(fresh)[k]), k
    assert (len(fitted) < len(got)) == ('unexpected' not in says)


def test_what_fits_warns_of_nothing(small):
    enc, state, write = small
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for s in (state, state | {'head.weight': torch.ones(3, 32), 'head.bias': torch.ones(3)}, {f'module.{k}': v for k, v in state.items()}, {k: v.double() for k, v in state.items()}):
            for partial in (False, True): assert torch.equal(load_encoder(write(s, epoch=3, optimizer=None), partial=partial).norm.weight, enc.norm.weight)


ABSURD = {'no heads': ('block0.attn.fn.to_qkv.weight', torch.zeros(0, 32), 'none of them empty'), 'half a head': ('block0.attn.fn.to_qkv.weight', torch.zeros(96, 32), 'heads of 64 units'),
          'another width of heads': ('block0.attn.fn.to_qkv.weight', torch.zeros(192, 33), 'on a width of 32'), 'no width': ('to_patch_embedding.2.weight', torch.zeros(0, 25), 'none of them empty'),
          'no patch': ('to_patch_embedding.2.weight', torch.zeros(2**40, 0), 'none of them empty'), 'three axes': ('to_patch_embedding.2.weight', torch.zeros(32, 25, 1), '2 axes'),
          'another width of positions': ('pos_embedding', torch.zeros(1, 10, 34), 'a width of 32 needs'), 'two tables': ('pos_embedding', torch.zeros(2, 10, 32), 'a width of 32 needs'),
          'a flat table': ('pos_embedding', torch.zeros(10, 32), '3 axes'), 'no positions': ('pos_embedding', torch.zeros(1, 2, 32), 'a width of 32 needs'),
          'a far block': ('block999999999.attn.norm.weight', torch.zeros(32), 'numbered 0, 1, 999999999'), 'a gap': ('block3.norm.weight', torch.zeros(32), 'without a gap'),
          'a far lead': ('lead_embeddings.999999999', torch.zeros(32), 'without a gap'), 'a thirteenth lead': ('lead_embeddings.12', torch.zeros(32), 'holds 13 leads, 12 names'),
          'repeated numbers': ('block0.attn.fn.to_qkv.weight', torch.zeros(1, 1).expand(2**28, 32), 'claims to hold tensors'),
          'a long number': ('block' + '9'*5000 + '.attn.norm.weight', torch.zeros(32), '1 unexpected'), 'odd digits': ('block٣.attn.norm.weight', torch.zeros(32), '1 unexpected')}


@pytest.fixture
def built(monkeypatch):
    "Devices on which encoders were made"
    on = []
    class Watched(ViT1d):
        def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); on.append(self.pos.device.type)
    monkeypatch.setattr(stmem, 'ViT1d', Watched)
    return on


@pytest.mark.parametrize('name', ABSURD)
def test_absurd_sizes_are_refused_before_memory_is_taken(small, built, name):
    _, state, write = small
    key, value, says = ABSURD[name]
    with pytest.raises(ValueError, match=says): load_encoder(write(state | {key: value}))
    assert set(built) <= {'meta'}
    if says != '1 unexpected':
        with pytest.raises(ValueError, match=says): load_encoder(write(state | {key: value}), partial=True)
        assert set(built) <= {'meta'}


def test_sizes_beyond_the_file_are_not_made(small, built):
    "A width of 4,000 costs the file little, and a model of it would have 2.6e8 numbers"
    _, state, write = small
    d = 4_000
    huge = state | {'to_patch_embedding.2.weight': torch.zeros(d, 1), 'pos_embedding': torch.zeros(1, 3, d), 'block0.attn.fn.to_qkv.weight': torch.zeros(1).expand(192, d)}
    path = write(huge | {'filler': torch.zeros(4*10**5)})
    for partial in (False, True):
        with pytest.raises(ValueError, match='wrong shape'): load_encoder(path, partial=partial)
    with pytest.raises(ValueError, match='holds 46 of the 36022 weights'): load_encoder(write(state | {f'block{i}.x': torch.zeros(1) for i in range(3000)}), partial=True)
    assert set(built) <= {'meta'}


def test_nothing_is_run(tmp_path, small):
    _, state, write = small
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'owned'),))
    for bad in (write(state, optimizer=Evil()), write(state | {'norm.bias': Evil()}), write(Evil())):
        for load in (load_encoder, load_stmem_mae, load_original_pma):
            for kwargs in ({}, dict(partial=True)):
                with pytest.raises(ValueError, match='pickles are not loaded'): load(bad, **kwargs)
    assert not (tmp_path/'owned').exists()
    torch.load(bad, weights_only=False)
    assert (tmp_path/'owned').exists()                           # the trap works


def test_the_wrong_kind_of_file_says_which_it_is(tmp_path, small):
    _, state, write = small
    with pytest.raises(ValueError, match='to_decoder_embedding.weight is missing'): load_stmem_mae(write(state))
    with pytest.raises(ValueError, match='no PMA classifier but ST-MEM encoder'): load_original_pma(write(state))
    with pytest.raises(ValueError, match='to_patch_embedding.2.weight is missing'): load_encoder(write({'resnet.conv1.weight': torch.ones(2)}))
    with pytest.raises(FileNotFoundError): load_encoder(tmp_path/'none.pth')


@pytest.fixture
def mae(small):
    torch.manual_seed(2)
    return MAE(deepcopy(small[0]).requires_grad_(True), 16, 2, 1)


def test_mae_with_what_the_schema_lacks(tmp_path, mae):
    path = save_stmem(mae, tmp_path/'mae.pth')
    with pytest.raises(ValueError, match='1 missing: fuse.scores'): load_stmem_mae(path, fuse=Static)
    with pytest.warns(PartialLoad, match='1 missing: fuse.scores'): m = load_stmem_mae(path, fuse=Static, partial=True)
    assert torch.equal(m.out.weight, mae.out.weight) and not m.fuse.scores.any()
    with pytest.raises(ValueError, match='the decoder reads Static'): save_stmem(m, tmp_path/'no.pth')
    for fuse in (Last, PPA):
        m = load_stmem_mae(path, fuse=fuse)
        assert type(m.fuse) is fuse and set(m.account.mapped.values()) >= {'pos', 'mask_token', 'blocks.1.mlp.3.bias'}
        same_file(raw(save_stmem(m, tmp_path/'again.pth')), raw(path))
    state = raw(path)
    for change, says in ((less(state, 'mask_embedding'), '1 missing: mask_embedding'), (state | {'decoder_pos_embed': torch.zeros(1, 10, 18)}, '1 wrong shape: decoder_pos_embed'),
                         (state | {'decoder_blocks.7.x': torch.zeros(1)}, 'without a gap'), (state | {'decoder_blocks.0.attn.fn.to_qkv.weight': torch.zeros(100, 16)}, 'heads of 64 units'),
                         (state | {'to_patch_embedding.3.bias': torch.zeros(32)+7}, 'which are meant'), (state | {'cls': torch.zeros(1)}, '1 unexpected: cls')):
        torch.save({'model': change}, tmp_path/'odd.pth')
        with pytest.raises(ValueError, match=says): load_stmem_mae(tmp_path/'odd.pth')
    assert load_encoder(path).account.ok


def test_a_pma_that_does_not_fit(small):
    enc, _, write = small
    torch.manual_seed(3)
    model = FusedModel(LayerStack(deepcopy(enc)), ReadOut(PMA(2, 32, hidden=(20, 10)), mlp_head(32, 3, hidden=7))).eval().requires_grad_(False)
    state = {k: v.clone() for k, v in stmem.published(model, stmem.pma_keys(2, 12)).items()}
    x = torch.randn(2, 12, 200)
    m = load_original_pma(write(state)).requires_grad_(False)
    assert torch.equal(m(x), model(x)) and torch.equal(m.weights(x), model.weights(x)) and find_encoder(m).account.ok
    for change, says in ((less(state, 'gating.net.0.bias'), '1 missing: gating.net.0.bias'), (state | {'gating.net.9.bias': torch.ones(1)}, '1 unexpected: gating.net.9.bias'),
                         (state | {'gating.net.7.weight': torch.ones(4, 10)}, r'wrong shape: gating.net.7.weight \(file \[4, 10\], model \[2, 10\]'),
                         (state | {'head.4.num_batches_tracked': torch.tensor(1+1j)}, r'wrong values: head.4.num_batches_tracked \(complex64\)'),
                         (state | {'head.4.num_batches_tracked': torch.tensor(True)}, r'wrong values: head.4.num_batches_tracked \(bool\)'),
                         (state | {'head.4.num_batches_tracked': torch.tensor(1.5)}, r'wrong values: head.4.num_batches_tracked \(float32\)'),
                         (less(state, 'head.6.weight'), 'head.6.weight is missing, from which'), (state | {'gating.net.4.weight': torch.ones(10)}, 'gating.net.4.weight has the shape')):
        with pytest.raises(ValueError, match=says): load_original_pma(write(change))
    with pytest.raises(ValueError, match='a FusedModel has no place'): save_stmem(m, write(state))
    with pytest.warns(PartialLoad, match='1 missing: gating.net.7.bias'): part = load_original_pma(write(less(state, 'gating.net.7.bias')), partial=True)
    assert torch.equal(part.head.classifier[6].weight, model.head.classifier[6].weight) and not part.training


def test_folder_has_no_use_for_what_files_need(tmp_path, small):
    enc = small[0]
    enc.prep = Preprocess(seq_len=200)
    save_encoder(enc, tmp_path/'enc')
    for kwargs in (dict(leads=LEADS), dict(partial=True)):
        with pytest.raises(ValueError, match='is a folder'): load_encoder(tmp_path/'enc', **kwargs)
    with pytest.raises(ValueError, match='leave prep out'): load_encoder(tmp_path/'enc', prep=Preprocess(seq_len=200, fs=250))
    assert load_encoder(tmp_path/'enc', prep=Preprocess(seq_len=200)).prep == enc.prep


def test_a_pma_checkpoint_becomes_a_folder_that_answers(file, arrays, tmp_path):
    "Labels and preprocessing are said once; afterwards the folder gives the logits of the fixture, and says where its encoder came from"
    model = load_original_pma(file('pma'))
    names = [f'label {i}' for i in range(arrays['pma_logits'].shape[1])]
    Predictor(model, Preprocess(PMA_LEADS, 100, 300), names).save(tmp_path/'pma')
    back = load_pma(tmp_path/'pma')
    x = torch.from_numpy(arrays['x']).float()
    with torch.no_grad(): logits, gates = back.model(x), back.model.weights(x)
    np.testing.assert_allclose(logits, arrays['pma_logits'], atol=1e-5)
    np.testing.assert_allclose(gates, arrays['pma_gates'], atol=1e-5)
    source = back.model.backbone.encoder.source
    assert source['sha256'] == sha256(file('pma').read_bytes()).hexdigest() and source['sha256'] in (tmp_path/'pma'/'README.md').read_text()
    assert load_encoder(tmp_path/'pma').source == source
