"""NF4 beside bitsandbytes on the CPU: tables, codes and scales, and decoded weights bit for bit."""

import bitsandbytes.functional as F
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from jaxft.kernels.quantised import nf4

GENERIC = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def weight(out, ins, dtype=torch.float32, seed=0):
    made = torch.randn(out, ins, generator=torch.Generator().manual_seed(seed))
    made *= torch.linspace(0.01, 0.1, out)[:, None]
    made[0] = 0  # a block of zeros has no scale
    return made.to(dtype)


def theirs(one, double=True):
    """bitsandbytes' state. Its CPU code of a scale is at times the second nearest: see below."""
    packed, state = F.quantize_4bit(one, quant_type="nf4", compress_statistics=double)
    if double:
        _, single = F.quantize_4bit(one, quant_type="nf4", compress_statistics=False)
        table = F.create_dynamic_map()
        codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(
            GENERIC, single.absmax - state.offset, table, 256
        )
        state.absmax, state.state2.absmax = codes, nested
    return packed.numpy(), state


def ours(packed, state, shape):
    """Our arrays from bitsandbytes' state."""
    out, blocks = shape[0], shape[1] // 64
    codes, scales = packed.reshape(out, blocks, 32), state.absmax.numpy().reshape(out, blocks)
    if not state.nested:
        return nf4.NF4(codes, scales)
    return nf4.NF4(codes, scales, state.state2.absmax.numpy(), state.offset.numpy())


def test_tables():
    np.testing.assert_array_equal(nf4.NF4_VALUES, F.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(nf4.DYNAMIC_VALUES, F.create_dynamic_map().numpy())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 576), (96, 64), (33, 1536)])
def test_codes_and_scales_are_bitsandbytes(shape, dtype, double):
    one = weight(*shape, dtype)
    wanted = ours(*theirs(one, double), shape)
    kernel = jnp.asarray(one.float().numpy().T)
    made = jax.jit(nf4.encode if double else nf4.encode_once, static_argnums=1)(kernel, 1)
    np.testing.assert_array_equal(made.codes, wanted.codes)
    if not double:
        np.testing.assert_array_equal(made.scales, wanted.scales)
        return
    # The mean's last bit depends on the order of a sum, which torch leaves open. A scale at the
    # border of two codes follows that bit.
    np.testing.assert_allclose(made.offset, wanted.offset, rtol=3e-7)
    np.testing.assert_allclose(made.nested, wanted.nested, rtol=1e-5)
    assert np.mean(np.asarray(made.scales) != wanted.scales) < 1e-3
    assert np.abs(np.asarray(made.scales, int) - wanted.scales).max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_codes_of_scales_are_bitsandbytes_with_its_own_mean(seed, monkeypatch):
    one = weight(300, 576, seed=seed)
    wanted = ours(*theirs(one), one.shape)
    monkeypatch.setattr(type(jnp.ones(1)), "mean", lambda _: jnp.asarray(wanted.offset))
    made = nf4.encode(jnp.asarray(one.numpy().T), 1)
    for name, array in made._asdict().items():
        np.testing.assert_array_equal(array, wanted._asdict()[name], err_msg=name)


@pytest.mark.parametrize("double", [True, False])
def test_decoded_weights_are_bitsandbytes_bit_for_bit(double):
    one = weight(512, 576)
    packed, state = F.quantize_4bit(one, quant_type="nf4", compress_statistics=double)
    held = ours(packed.numpy(), state, one.shape)
    made = jax.jit(nf4.decode, static_argnums=(1, 2))(held, (576,), np.float32)
    np.testing.assert_array_equal(made, F.dequantize_4bit(packed, state).numpy())


def test_half_precision_is_rounded_once():
    """The formula of bitsandbytes in torch: its CPU library rounds ties of bf16 up instead."""
    one = weight(512, 576)
    packed, state = F.quantize_4bit(one, quant_type="nf4")
    held = ours(packed.numpy(), state, one.shape)
    for dtype, other in ((jnp.bfloat16, torch.bfloat16), (jnp.float16, torch.float16)):
        made = jax.jit(nf4.decode, static_argnums=(1, 2))(held, (576,), dtype)
        wanted = _dequantize_4bit_compute.__wrapped__(
            packed.reshape(-1), state.absmax, state.code, 64, one.shape, other
        )
        np.testing.assert_array_equal(np.asarray(made, np.float32), wanted.float().numpy())


def test_dims_of_inputs_and_outputs_keep_their_order():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((2, 64, 3, 5)).astype(np.float32)  # [*ins, *outs]
    made = nf4.encode(jnp.asarray(kernel), 2)
    flat = nf4.encode(jnp.asarray(kernel.reshape(128, 15)), 1)
    assert made.codes.shape == (3, 5, 2, 32)
    np.testing.assert_array_equal(made.codes.reshape(15, 2, 32), flat.codes)
    decoded = nf4.decode(made, (2, 64), np.float32)
    assert decoded.shape == (3, 5, 2, 64)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(decoded), (0, 1), (2, 3)), kernel, atol=0.2 * np.abs(kernel).max()
    )
    assert nf4.axes(("a", "b", "c", "d"), 2).codes == ("c", "d", "a", None)
