"The modules of nbs/howto/other_encoders.ipynb against implementations of others, where these are installed"
import ast, json, re
from pathlib import Path

import pytest, torch
from torch import nn

from fastai_ecg_pma.layers import LayerStack
from fastai_ecg_pma.transfer import load_weights

TINY = dict(d=32, n_layers=3, n_heads=2, d_ff=64, d_conv=16, pos=16, groups=4)

@pytest.fixture(scope='module')
def page():
    "The classes and functions of the page, without running the rest of it"
    nb = json.loads((Path(__file__).parents[1]/'nbs/howto/other_encoders.ipynb').read_text())
    code = [n for c in nb['cells'] if c['cell_type'] == 'code' for n in ast.parse(''.join(c['source'])).body]
    names = {}
    exec(compile(ast.Module([n for n in code if isinstance(n, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))], []), 'page', 'exec'), names)
    return names

def hubert_model(kernels=(10,3,3,2,2), strides=(4,2,2,2,2), n_leads=1):
    "transformers' own, with weights that are far from their initial ones"
    transformers = pytest.importorskip('transformers')
    m = transformers.HubertModel(transformers.HubertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_dim=(16,)*len(kernels), conv_kernel=kernels,
                                                           conv_stride=strides, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))
    m.feature_extractor.conv_layers[0].conv = nn.Conv1d(n_leads, 16, kernels[0], strides[0], bias=False)
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    return m.eval()

def close(a, b):
    assert b.std() > .1
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@torch.no_grad()
def test_hubert_is_that_of_transformers(page):
    torch.manual_seed(0); theirs, x = hubert_model(), torch.randn(2, 6000)
    ours = load_weights(page['Hubert'](**TINY), theirs.state_dict()).eval()
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    close(ours(x)['last_hidden_state'], theirs(x).last_hidden_state)
    close(page['fold_weight_norm'](ours)(x)['last_hidden_state'], theirs(x).last_hidden_state)

@torch.no_grad()
def test_stack_of_the_transformers_model_itself(page):
    torch.manual_seed(0); theirs, x = hubert_model(), torch.randn(2, 12, 500)
    wrapped = page['OneLeadAfterTheOther'](theirs)
    stack = LayerStack(wrapped, (12,500), pool=None)
    assert (stack.n_layers, stack.n_tokens, stack.has_leads) == (3, 93, False)
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    hidden = theirs(((x-low)/(high-low)*2-1).reshape(2, -1), output_hidden_states=True).hidden_states
    close(stack(x), torch.stack(hidden, 1))

def of_transformers(k):
    "The name in transformers of what ECG-FM calls `k`"
    k = re.sub(r'conv_layers\.(\d)\.0\.', r'conv_layers.\1.conv.', k)
    k = re.sub(r'conv_layers\.(\d)\.2\.', r'conv_layers.\1.layer_norm.', k)
    for a,b in {r'^layer_norm': 'feature_projection.layer_norm', '^post_extract_proj': 'feature_projection.projection', r'^conv_pos\.pos_conv\.0': 'encoder.pos_conv_embed.conv', '^mask_emb': 'masked_spec_embed',
                'self_attn_layer_norm': 'layer_norm', r'self_attn\.': 'attention.', 'fc1': 'feed_forward.intermediate_dense', 'fc2': 'feed_forward.output_dense'}.items(): k = re.sub(a, b, k)
    return k

@torch.no_grad()
def test_ecg_fm_is_that_with_twelve_channels(page):
    torch.manual_seed(0); theirs, x = hubert_model((2,)*4, (2,)*4, 12), torch.randn(2, 12, 2500)
    ours = page['EcgFm'](**TINY).eval()
    load_weights(ours, {k: theirs.state_dict()[of_transformers(k)] for k in ours.state_dict()})
    assert len({of_transformers(k) for k in ours.state_dict()}) == len(theirs.state_dict())
    h = x
    for c in theirs.feature_extractor.conv_layers: h = c(h)
    close(ours(x)['x'], theirs.encoder(theirs.feature_projection(h.mT)).last_hidden_state)

@torch.no_grad()
def test_jepa_block_is_that_of_timm(page):
    vit = pytest.importorskip('timm.models.vision_transformer')
    torch.manual_seed(0); theirs, h = vit.Block(32, 2, qkv_bias=False, norm_layer=nn.LayerNorm).eval(), torch.randn(2, 40, 32)
    for p in theirs.parameters(): nn.init.normal_(p, std=.3)
    close(load_weights(page['JepaBlock'](32, 2), theirs.state_dict())(h), theirs(h))

def test_jepa_mask_by_hand(page):
    allowed = page['same_lead_or_time'](3, 4)
    for i in range(12):
        for j in range(12): assert allowed[i,j] == (i//4 == j//4 or i%4 == j%4)

def test_jepa_in_full_by_hand(page):
    "One head, loops instead of reshapes; positions before each block"
    torch.manual_seed(0); m, x = page['Jepa'](2, 3, 5, 8, 2, 1).double(), torch.randn(2, 2, 15).double()
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    out = []
    for r in x:
        h = torch.stack([m.W_P(r[l,5*t:5*t+5]) for l in range(2) for t in range(3)])
        for b in m.encoder_blocks.blocks:
            h = h + m.pos_embed
            q,k,v = b.attn.qkv(b.norm1(h)).chunk(3, -1)
            near = [[j for j in range(6) if i//3 == j//3 or i%3 == j%3] for i in range(6)]
            h = h + b.attn.proj(torch.stack([((k[n] @ q[i])/8**.5).softmax(0) @ v[n] for i,n in enumerate(near)]))
            h = h + b.mlp.fc2(nn.functional.gelu(b.mlp.fc1(b.norm2(h))))
        out.append(m.norm(h).mean(0))
    torch.testing.assert_close(m.representation(x), torch.stack(out))
    torch.testing.assert_close(page['positions_into_blocks'](m).representation(x), torch.stack(out))
