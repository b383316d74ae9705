"""What is read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from matrix_jax.benchmark import hlo


def split_program(turns):
    """HLO of a loop that sums over 4 devices 'turns' times, on float32 [8 16]."""
    mesh = Mesh(np.array(jax.devices()[:4]), 'a')

    def one(x, _):
        total = jax.shard_map(
            lambda part: jax.lax.psum(part, 'a'),
            mesh=mesh,
            in_specs=PartitionSpec('a'),
            out_specs=PartitionSpec(),
        )(x)
        return jax.lax.with_sharding_constraint(
            x + jnp.tile(jnp.sin(total), (4, 1)), NamedSharding(mesh, PartitionSpec('a'))
        ), None

    x = jax.ShapeDtypeStruct((8, 16), 'float32', sharding=NamedSharding(mesh, PartitionSpec('a')))
    loop = jax.jit(lambda x: jax.lax.scan(one, x, length=turns)[0])
    return loop.lower(x).compile().as_text()


@pytest.mark.parametrize('turns', [1, 5])
def test_a_collective_in_a_loop_counts_as_often_as_it_turns(turns):
    found = hlo.collectives(split_program(turns), 4)
    assert set(found) == {'all-reduce'}
    assert found['all-reduce']['count'] == turns
    assert found['all-reduce']['bytes'] == turns * 2 * 16 * 4 * 2 * 3 / 4


@pytest.mark.parametrize(
    'line, kind, sent',
    [
        ('%a = f32[8,16]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}', 'all-gather', 512 / 2),
        (
            '%a = (f32[4]{0}, f32[4]{0}) all-to-all(%x, %y), replica_groups={{0,1}}',
            'all-to-all',
            16,
        ),
        (
            "%a = f32[8,16]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}",
            'all-gather',
            512 * 3 / 4,
        ),
        (
            "%a = f32[8,16]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}",
            'all-gather',
            512 * 3 / 4,
        ),
        ('%a = bf16[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]', 'reduce-scatter', 24),
        ('%all-reduce.1 = f32[4]{0} add(%x, %y)', '', 0),
    ],
)
def test_bytes_that_a_device_sends(line, kind, sent):
    text = f'ENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}\n'
    found = hlo.collectives(text, 8)
    assert found == ({kind: {'count': 1, 'bytes': sent, 'overlapped': 0}} if kind else {})


@pytest.mark.parametrize(
    'branches',
    ['true_computation=%few, false_computation=%many', 'branch_computations={%few, %many}'],
)
def test_of_two_branches_the_one_that_sends_more_counts(branches):
    text = '\n'.join(
        [
            '%few (x: f32[4]) -> f32[4] {',
            '  %a = f32[4]{0} all-gather(%x), replica_groups={{0,1}}',
            '}',
            '%many (x: f32[4]) -> f32[4] {',
            '  %a = f32[8]{0} all-gather(%x), replica_groups={{0,1}}',
            '}',
            'ENTRY %main (x: f32[4]) -> f32[4] {',
            f'  %c = f32[4]{{0}} conditional(%p, %x, %x), {branches}',
            '}',
        ]
    )
    assert hlo.collectives(text, 2) == {'all-gather': {'count': 1, 'bytes': 16, 'overlapped': 0}}


PAIRS = {
    'all-gather': (
        '%s = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]',
        '%d = bf16[16]{0} all-gather-done(%s)',
        32 * 3 / 4,
    ),
    'collective-permute': (
        '%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), '
        'source_target_pairs={{0,1}}',
        'ROOT %d = f32[4]{0} collective-permute-done(%s)',
        16,
    ),
    'all-to-all': (
        '%s = ((bf16[8]{0}, bf16[8]{0}), (bf16[8]{0}, bf16[8]{0})) all-to-all-start(%x, %y), '
        'replica_groups={{0,1}}',
        '%d = (bf16[8]{0}, bf16[8]{0}) all-to-all-done(%s)',
        16,
    ),
    'reduce-scatter': (
        '%s = ((bf16[8]{0}), bf16[4]{0}) reduce-scatter-start(%x), replica_groups={{0,1}}',
        '%d = bf16[4]{0} reduce-scatter-done(%s)',
        8,
    ),
}
BETWEEN = {
    '%c = bf16[8,8]{1,0} custom-call(%p, %q), custom_call_target="__cublas$lt$matmul"': 1,
    '%c = bf16[8,8]{1,0} fusion(%p), kind=kLoop, calls=%f': 0,
}


@pytest.mark.parametrize('between', BETWEEN)
@pytest.mark.parametrize('kind', PAIRS)
def test_an_asynchronous_collective_counts_once_by_its_result(kind, between):
    start, done, sent = PAIRS[kind]
    text = f'ENTRY %main (x: f32[4]) -> f32[4] {{\n  {start}\n  {between}\n  {done}\n}}\n'
    assert hlo.collectives(text, 8) == {
        kind: {'count': 1, 'bytes': sent, 'overlapped': BETWEEN[between]}
    }


KERNELS = """
%sliced (p: bf16[4,64], i: s32[]) -> bf16[1,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = bf16[1,64]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,64}
}

%updated (p: bf16[4,64], u: bf16[1,64], i: s32[]) -> bf16[4,64] {
  %p.1 = bf16[4,64]{1,0} parameter(0)
  %u.1 = bf16[1,64]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %w = bf16[4,64]{1,0} dynamic-update-slice(%p.1, %u.1, %i.1, %i.1)
}

%softmax (p: f32[8,9]) -> f32[8] {
  %p.2 = f32[8,9]{1,0} parameter(0)
  %m = f32[8]{0} reduce(%p.2, %z), metadata={op_name="jit(f)/attention_softmax/reduce_max"}
  ROOT %r = f32[8]{0} dot(%p.2, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %a = bf16[1,64]{1,0} fusion(%w.1, %j), kind=kLoop, calls=%sliced
  %c = (bf16[8,32]{1,0}, s8[4]{0}) custom-call(%l, %k), custom_call_target="__cublas$lt$matmul", \
backend_config={"lhs_contracting_dimensions":["1"]}
}

ENTRY %main (w: bf16[4,64]) -> bf16[4,64] {
  %w.1 = bf16[4,64]{1,0} parameter(0)
  %l = bf16[8,16]{1,0} parameter(1)
  %x = bf16[1,6,4,4,8]{4,3,2,1,0} parameter(2)
  %k = bf16[3,3,3,8,16]{4,3,2,1,0} parameter(3)
  %n = bf16[1,8,6,4,4]{4,3,2,1,0} parameter(4)
  %q = bf16[1,12,2,16]{3,2,1,0} parameter(5)
  %g = f32[8,9]{1,0} parameter(6)
  %j = s32[] parameter(7)
  %loop = (s32[], bf16[4,64]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %u = bf16[4,64]{1,0} fusion(%w.1, %a.1, %j), kind=kLoop, calls=%updated
  %h = f32[8]{0} fusion(%g), kind=kInput, calls=%softmax
  %v = (bf16[1,4,4,4,16]{4,3,2,1,0}, u8[0]{0}) custom-call(%x, %k), dim_labels=b012f_012io->b012f, \
custom_call_target="__cudnn$convForward"
  %y = (bf16[1,16,4,4,4]{4,3,2,1,0}, u8[0]{0}) custom-call(%n, %k), dim_labels=bf012_012io->bf012, \
custom_call_target="__cudnn$convForward"
  %z.1 = (bf16[1,2,12,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
}
"""


def test_kernels_of_a_program():
    found = hlo.summary(KERNELS)
    convolution = 2 * (4 * 4 * 4 * 16) * 27 * 8
    assert found['launches'] == 5 * 2 + 5
    assert found['products'] == 5
    assert found['attention'] == {'cudnn': 1, 'gradient': 0, 'dense': 1}
    assert found['convolutions'] == {'channels last, bf16': 1, 'channels first, bf16': 1}
    assert found['flops'] == (
        5 * 2 * 8 * 32 * 16 + 2 * convolution + 4 * 12 * 2 * 16 * 12 + 2 * 8 * 9
    )
    # Slices of a large operand, an update in place, and what a softmax reads and writes.
    assert found['bytes'] == 6 * (128 + 128 + 4) + (288 + 32)
    assert found['transposed_bytes'] == 2 * 2 * (8 * 6 * 4 * 4 + 16 * 4 * 4 * 4)
    assert not found['float64'] and not found['callbacks'] and not found['collectives']


def test_of_a_condition_the_true_branch_runs():
    text = """
%no (x: f32[4]) -> f32[4] {
  %a = f32[4]{0} copy(%x)
  %b = f32[4]{0} copy(%a)
}

%yes (x: f32[4]) -> f32[4] {
  %c = f32[4]{0} copy(%x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %o = f32[4]{0} conditional(%p, %x, %x), BRANCHES
}
"""
    for branches in (
        'branch_computations={%no, %yes}',
        'true_computation=%yes, false_computation=%no',
    ):
        assert hlo.summary(text.replace('BRANCHES', branches))['launches'] == 1
