import json
import pathlib

import jax
import numpy as np
import pytest
from einops import rearrange
from safetensors import safe_open

from matrix_jax.convert import to_jax, to_torch
from matrix_jax.dit import cogvideox

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix'
CASES = ('a_stage1_transformer', 'a_stage2_transformer', 'a_stage2_transformer_offsize',
         'b_stage3_transformer', 'b_stage3_transformer_uniform_t', 'b_stage4_transformer',
         'b_stage4_transformer_nocond')


def golden(case):
    """(released config, tensors by kind, tolerance) of a recorded case."""
    kinds = {'weights': {}, 'inputs': {}, 'outputs': {}}
    with safe_open(GOLDENS / f'{case}.safetensors', 'numpy') as file:
        for name in file.keys():
            kind, key = name.split('/', 1)
            kinds[kind][key] = file.get_tensor(name)
        metadata = file.metadata()
    return json.loads(metadata['config'])['cfg'], kinds, float(metadata['atol'])


@pytest.mark.parametrize('case', CASES)
def test_replays_the_reference(case):
    released, kinds, tolerance = golden(case)
    cfg = cogvideox.Config.from_released(released)
    params = to_jax(cogvideox.weights(cfg), kinds['weights'], cogvideox.shapes(cfg))
    inputs = kinds['inputs']
    latents = rearrange(inputs['hidden_states'], 'b t c h w -> b t h w c')
    guidance = inputs.get('timestep_cond')
    if guidance is not None:
        guidance = rearrange(guidance, '(b t) p -> b t p', b=latents.shape[0])
    v = jax.jit(cogvideox.DiT(cfg).apply)(
        {'params': params}, latents, inputs['encoder_hidden_states'], inputs['timestep'],
        inputs.get('control_emb'), guidance)
    want = rearrange(kinds['outputs']['sample'], 'b t c h w -> b t h w c')
    np.testing.assert_allclose(v, want, atol=tolerance, rtol=tolerance)
    back = to_torch(cogvideox.weights(cfg), params)
    assert back.keys() == kinds['weights'].keys()
    assert all(np.array_equal(back[key], kinds['weights'][key]) for key in back)
