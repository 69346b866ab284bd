"""Row-wise int8 beside bitsandbytes on the CPU: codes, scales and decoded weights bit for bit."""

import bitsandbytes.functional as F
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxft.kernels.quantised import int8


def test_codes_scales_and_decoded_weights_are_bitsandbytes():
    weight = (torch.randn(96, 200, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    codes, scales, _ = F.int8_vectorwise_quant(weight.clone())
    made = jax.jit(int8.encode, static_argnums=1)(jnp.asarray(weight.float().numpy().T), 1)
    np.testing.assert_array_equal(made.codes, codes.numpy())
    np.testing.assert_array_equal(made.scales, scales.numpy())
    decoded = jax.jit(int8.decode, static_argnums=(1, 2))(made, (200,), np.float32)
    np.testing.assert_array_equal(decoded, F.int8_vectorwise_dequant(codes, scales).numpy())


def test_a_row_of_zeros_and_several_dims():
    kernel = np.random.default_rng(0).standard_normal((2, 8, 3, 5)).astype(np.float32)
    kernel[..., 1, 2] = 0
    made = int8.encode(jnp.asarray(kernel), 2)
    assert made.codes.shape == (3, 5, 2, 8) and made.scales.shape == (3, 5)
    decoded = int8.decode(made, (2, 8), np.float32)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(decoded), (0, 1), (2, 3)), kernel, atol=np.abs(kernel).max() / 254
    )
    assert int8.axes(("a", "b", "c", "d"), 2).codes == ("c", "d", "a", "b")
