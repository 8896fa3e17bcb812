"Agreement with the original implementations: arrays they computed, in float64, for one small random model"
import json

import numpy as np, pytest, torch

from fastai_ecg_pma.aggregate import PPA, Last
from fastai_ecg_pma.layers import LayerStack
from fastai_ecg_pma.masking import hide, masked_mse, patchify
from fastai_ecg_pma.stmem import load_original_pma, load_stmem_mae
from fastai_ecg_pma.weights import load_encoder

TOL = dict(rtol=0, atol=1e-10)

@pytest.fixture(scope='module')
def ref(shared):
    folder = shared('fixtures')
    return dict(folder=folder, arrays=np.load(folder/'twelve_lead.npz'), sizes=json.loads((folder/'twelve_lead.json').read_text()))

@pytest.fixture(params=['twelve_lead_encoder', 'twelve_lead_pretrain', 'twelve_lead_pma'])
def encoder(ref, request): return load_encoder(ref['folder']/f'{request.param}.pth').double().requires_grad_(False)

def array(ref, name): return torch.from_numpy(ref['arrays'][name].astype(np.float64))

def agree(a, b): torch.testing.assert_close(a, b, **TOL)

def test_sizes_are_read_from_the_weights(ref, encoder):
    s = ref['sizes']
    assert {k: encoder.config[k] for k in ('seq_len', 'ps', 'd', 'n_layers', 'n_heads')} == dict(
        seq_len=s['seq_len'], ps=s['patch_size'], d=s['embed_dim'], n_layers=s['depth'], n_heads=s['num_heads'])

def test_hidden_and_pooled(ref, encoder):
    x = array(ref, 'x')
    agree(torch.stack(list(encoder.states(x)), 1), array(ref, 'hidden'))
    agree(LayerStack(encoder)(x), array(ref, 'pooled'))

@pytest.mark.parametrize('fuse,name', [(Last, 'last'), (PPA, 'ppa')])
def test_fixed_read_outs(ref, encoder, fuse, name):
    h = LayerStack(encoder)(array(ref, 'x'))
    agree(encoder.norm(fuse(encoder.n_layers, encoder.d)(h)), array(ref, name))

def test_pma(ref):
    m = load_original_pma(ref['folder']/'twelve_lead_pma.pth').double().requires_grad_(False)
    x = array(ref, 'x')
    h = m.backbone(x)
    agree(m.weights(x), array(ref, 'pma_gates'))
    agree(m.head.fuse(h), array(ref, 'pma_fused'))
    agree(m.backbone.norm(m.head.fuse(h)), array(ref, 'pma_normed'))
    agree(m(x), array(ref, 'pma_logits'))

@pytest.mark.parametrize('task', ['stmem', 'ipastmem'])
def test_masked_pretraining(ref, task):
    m = load_stmem_mae(ref['folder']/'twelve_lead_pretrain.pth', fuse=PPA if task == 'ipastmem' else Last).double()
    x = array(ref, 'x')
    noise = array(ref, 'noise')
    mask = hide(noise, .75)
    agree(mask.double(), array(ref, f'{task}_mask').double())
    # the original keeps visible patches in the order of their noise, we keep them in time
    B, C, n = noise.shape
    v = int((~mask[0, 0]).sum())
    by_noise = noise.argsort(-1)[..., :v]
    latent = array(ref, f'{task}_latent').unflatten(1, (C, -1))
    in_time = latent.gather(2, order_in_time(by_noise, v)[..., None].expand(-1, -1, -1, latent.shape[-1]))
    agree(m.encode(x, mask).unflatten(1, (C, -1)), in_time)
    pred = m(x, mask)
    agree(pred, array(ref, f'{task}_pred'))
    loss = masked_mse(pred, patchify(x, m.encoder.ps), mask)
    agree(loss, array(ref, f'{task}_loss'))
    loss.backward()
    check_gradients(ref, m, task)

def order_in_time(by_noise, v):
    "Positions, in the original's token order with separators, of the tokens in time order"
    B, C, _ = by_noise.shape
    inner = by_noise.argsort(-1) + 1
    return torch.cat([torch.zeros(B, C, 1, dtype=int), inner, torch.full((B, C, 1), v + 1)], -1)

def check_gradients(ref, m, task):
    names = [k.split('/', 1)[1] for k in ref['arrays'].files if k.startswith(f'{task}_grad/')]
    ours = {'encoder.to_patch_embedding.2.weight': m.encoder.embed[1].weight.grad, 'encoder.sep_embedding': m.encoder.sep.grad,
            'encoder.lead_embeddings.1': m.encoder.lead.grad[1], 'mask_embedding': m.mask_token.grad[None, None],
            'decoder_head.weight': m.out.weight.grad, 'encoder.block0.attn.fn.to_qkv.weight': m.encoder.blocks[0].attn.qkv.weight.grad}
    assert set(names) == set(ours)
    for name in names: agree(ours[name], array(ref, f'{task}_grad/{name}'))
