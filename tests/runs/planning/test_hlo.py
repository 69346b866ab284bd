"""Costs counted in compiled programs, against the formulas of what was compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.core.sharding import make_mesh
from jaxft.runs.planning import hlo

# The text of XLA for a GPU, in part: its lines are long.
CUDNN = """
HloModule m

ENTRY %main (q: bf16[2,64,4,32], k: bf16[2,64,4,32]) -> bf16[2,64,4,32] {
  %q = bf16[2,64,4,32]{3,2,1,0} parameter(0)
  %k = bf16[2,64,4,32]{3,2,1,0} parameter(1)
  %fmha = (bf16[2,4,64,32]{3,1,2,0}, f32[2,4,64]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type":"MASK","intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","64","64"]}}}
  %conv = (bf16[2,8,8,16]{3,2,1,0}, u8[4096]{0}) custom-call(%q, %k), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %gemm = (bf16[64,128]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %out = bf16[2,64,4,32]{3,2,1,0} get-tuple-element(%fmha), index=0
}
"""  # noqa: E501


def compiled(function, *shapes, **places):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, **places) for shape in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def total(text, name):
    return sum(cost.times * getattr(cost, name) for cost in hlo.costs(text))


def test_products_in_nested_loops_are_counted_as_often_as_they_run():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0], None

    text = compiled(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (64, 32), (5, 7, 32, 32))
    assert total(text, "flops") == 5 * 7 * 2 * 64 * 32 * 32


def test_a_convolution_counts_its_kernel_for_every_output_but_not_the_padding():
    text = compiled(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 16, 16, 8),
        (3, 3, 8, 24),
    )
    assert total(text, "flops") == 2 * (2 * 24 * 8) * (8 * 3 - 1) ** 2


@pytest.mark.parametrize("inner, outer", [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_of_spread_pixels_or_weights_counts_no_zeros(inner, outer):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), [(1, 1)], (inner,), (outer,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    text = compiled(convolve, (2, 9, 4), (3, 4, 5))
    pixels = np.zeros(19 * inner, bool)
    pixels[1 : 1 + 9 * inner : inner] = True  # after one place of padding
    count = jax.eval_shape(convolve, jnp.ones((2, 9, 4)), jnp.ones((3, 4, 5))).shape[1]
    pairs = sum(bool(pixels[out + outer * k]) for out in range(count) for k in range(3))
    assert total(text, "flops") == 2 * 2 * 4 * 5 * pairs


def test_a_matrix_product_that_a_tpu_writes_as_a_convolution_counts_as_the_product():
    """As libtpu computes [2, 256] x [256, 32, 64]: of 32 reads 31 are padding."""
    text = """
ENTRY %main () -> bf16[2,1,32,64] {
  %x = bf16[256,1,2,1]{3,2,1,0} parameter(0)
  %w = bf16[64,32,256,1]{3,2,1,0} parameter(1)
  ROOT %y = bf16[2,1,32,64]{3,2,1,0} convolution(%x, %w), window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=f0b1_o1i0->b01f
}
"""  # noqa: E501
    assert total(text, "flops") == 2 * 2 * 256 * 32 * 64


def test_elementwise_work_reads_and_writes_each_array_once():
    text = compiled(lambda a, b: jnp.tanh(a) * b + a, (1024, 256), (1024, 256))
    assert total(text, "traffic") == 3 * 4 * 1024 * 256
    assert total(text, "flops") == 0


def test_a_row_read_from_a_stack_is_not_the_whole_stack():
    """A scan over layers reads each layer once: the stack in all, and the carry each time."""
    text = compiled(
        lambda x, ws: jax.lax.scan(lambda x, w: (x * w, None), x, ws)[0], (4096,), (9, 4096)
    )
    assert total(text, "traffic") < 1.5 * 9 * 3 * 4 * 4096


def test_collectives_count_their_bytes_on_one_device():
    mesh = make_mesh(fsdp=8)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    gathered = jax.jit(lambda x: jnp.sin(x), in_shardings=rows, out_shardings=whole)
    text = gathered.lower(jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile().as_text()
    moved = {c.op.opcode: c.times * c.moved for c in hlo.costs(text) if c.moved}
    assert moved == {"all-gather": 4 * 64 * 128}
    summed = jax.jit(lambda x: (x * x).sum(0), in_shardings=rows, out_shardings=whole)
    text = summed.lower(jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile().as_text()
    moved = {c.op.opcode: c.times * c.moved for c in hlo.costs(text) if c.moved}
    assert moved == {"all-reduce": 4 * 128}


@pytest.mark.parametrize(
    ("target", "flops"),
    [
        ("__cudnn$fmhaSoftmax", 4 * 2 * 4 * 64 * 64 * 32),
        # The kernel has the shape of k, o01i = [2, 64, 4, 32].
        ("__cudnn$convForward", 2 * (2 * 8 * 8 * 16) * (64 * 4 * 32)),
    ],
)
def test_kernels_of_nvidia_are_counted_by_their_shapes(target, flops):
    (cost,) = [c for c in hlo.costs(CUDNN) if c.op.target == target]
    assert cost.flops == flops


def test_a_causal_mask_leaves_half_and_backward_costs_two_and_a_half_times():
    text = CUDNN.replace('"MASK"', '"CAUSAL"').replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    (cost,) = [c for c in hlo.costs(text) if "fmha" in c.op.target]
    assert cost.flops == 0.5 * 10 * 2 * 4 * 64 * 64 * 32


def test_what_lies_in_a_tpus_vector_memory_moves_no_bytes():
    assert hlo.size("f32[8,128]{1,0:T(8,128)}") == 4096
    assert hlo.size("f32[8,128]{1,0:T(8,128)S(1)}") == 0
    assert hlo.size("(bf16[16]{0}, u8[], s32[2,3]{1,0})") == 32 + 1 + 24
