"""Arguments of cuDNN's attention, with a stand-in that masks by the documented meaning of each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxft.core.runtime import Device
from jaxft.kernels.attention.attention import attention, reference
from jaxft.kernels.attention.cudnn_attention import CUDNN_MULTIPLE, refusal, runs
from tests.devices import traced_for
from tests.kernels.attention.test_attention import data, same

SEGMENTS = jnp.array([[1] * 9 + [2] * 12 + [3] * 10 + [0] * 6, [1] * 30 + [2] * 7])  # [2, 37]


@pytest.mark.parametrize(
    ("platform", "dtype", "dim", "text"),
    [
        ("gpu", jnp.bfloat16, 40, ""),
        ("gpu", jnp.float16, 256, ""),
        ("gpu", jnp.float32, 64, "compute_dtype is float32"),
        ("gpu", jnp.bfloat16, 264, "up to 256, and the model has 264"),
        ("gpu", jnp.bfloat16, 36, "multiples of 8"),
        ("tpu", jnp.bfloat16, 64, "it runs on GPUs"),
        ("cpu", jnp.bfloat16, 64, "it runs on GPUs"),
    ],
)
def test_it_runs_on_a_gpu_in_half_precision(platform, dtype, dim, text):
    q = jax.ShapeDtypeStruct((1, 8, 2, dim), dtype)
    found = refusal(Device(platform, "kind"), q, None, False)
    assert (text in found) if text else not found


@pytest.fixture
def on_gpu(monkeypatch):
    """The kernel of a GPU is chosen, for the arrays of a CPU."""
    monkeypatch.setattr(
        "jaxft.kernels.attention.attention.choose", lambda q, soft_cap, sinks: "cudnn"
    )


@pytest.mark.parametrize(
    ("causal", "length", "kv_length"),
    [(True, 37, 37), (True, 40, 40), (False, 37, 37), (False, 40, 40), (False, 37, 77)],
)
def test_padding_of_odd_lengths_changes_nothing(causal, length, kv_length, monkeypatch, on_gpu):
    """cuDNN's stand-in is jax's own formula, which masks by the same arguments."""
    plain, shapes = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **how):
        assert implementation == "cudnn"
        shapes.append((q.shape[1], k.shape[1]))
        return plain(q, k, v, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    mask = jnp.tril(jnp.ones((1, length, kv_length), bool)) if causal else None
    args = data(length=length, kv_length=kv_length)
    same(args, partial(attention, causal=causal), mask)
    assert shapes and all(size % CUDNN_MULTIPLE == 0 for pair in shapes for size in pair)


def test_runs_are_the_first_tokens_and_lengths_of_segments():
    starts, sizes = runs(SEGMENTS, 5)
    assert starts.tolist() == [[0, 9, 21, 31, -1, -1], [0, 30, -1, -1, -1, -1]]
    assert sizes.tolist() == [[9, 12, 10, 6, -1], [30, 7, -1, -1, -1]]


def packed(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, **more):
    """Attention within [offset, offset + length) of each row, undefined outside of all of them."""
    assert mask_type is cudnn.MaskType.PADDING_CAUSAL
    assert q.shape[2] == k.shape[2], "jax computes the keys' offsets from the query heads"
    window = more.pop("sliding_window_length")
    assert not more and q_seqlen is kv_seqlen and q_offsets is kv_offsets
    place = jnp.arange(q.shape[1])
    first, length = q_offsets[:, :-1, None], q_seqlen[:, :, None]  # [B, M, 1]
    inside = (length > 0) & (place >= first) & (place < first + length)  # [B, M, T]
    together = jnp.einsum("bmt,bms->bts", inside * 1.0, inside * 1.0) > 0
    mask = together & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    out = reference(q, k, v, mask, scale)
    return jnp.where(inside.any(1)[:, :, None, None], out, jnp.nan)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("most", [4, 9])
def test_segments_reach_cudnn_as_offsets_and_lengths(most, window, monkeypatch, on_gpu):
    monkeypatch.setattr(cudnn, "dot_product_attention", packed)
    before = jnp.arange(37)[:, None] - jnp.arange(37)
    mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (before >= 0)
    mask = mask if window is None else mask & (before < window)
    ours = partial(attention, causal=True, q_segments=SEGMENTS, window=window, segments_in_row=most)
    same(data(), ours, mask)  # the padding too, which is finite


def test_without_their_number_segments_are_computed_by_blocks(monkeypatch, on_gpu):
    monkeypatch.setattr(cudnn, "dot_product_attention", None)
    mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & jnp.tril(jnp.ones((37, 37), bool))
    same(data(), partial(attention, causal=True, q_segments=SEGMENTS), mask)


def test_an_odd_length_of_segments_is_padded_by_the_last_one(monkeypatch, on_gpu):
    shapes = []

    def record(q, k, v, **how):
        shapes.append((q.shape, k.shape, how["q_offsets"].shape, how["q_seqlen"].shape))
        return packed(q, k, v, **how)

    monkeypatch.setattr(cudnn, "dot_product_attention", record)
    out = attention(*data(), causal=True, q_segments=SEGMENTS, segments_in_row=4)
    assert shapes == [((2, 40, 4, 8), (2, 40, 4, 8), (2, 5), (2, 4))]
    assert np.isfinite(out).all() and out.shape == (2, 37, 4, 8)


def test_a_traced_step_for_a_gpu_calls_cudnn_for_packed_rows(monkeypatch):
    """The private function of jax still takes these arguments: jaxft pins no version of jax."""
    for name, answer in (
        ("check_cudnn_version", lambda: 91000),
        ("check_compute_capability", lambda _: True),
        ("is_cuda_compute_capability_equal", lambda one: one == "9.0"),
    ):
        monkeypatch.setattr(cudnn, name, answer)
    args = [x.astype(jnp.bfloat16) for x in data()]
    with traced_for("gpu"):
        ours = partial(attention, causal=True, q_segments=SEGMENTS, segments_in_row=4)
        gradient = jax.grad(lambda *a: ours(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        text = str(jax.make_jaxpr(gradient)(*args))
    assert "dot_product_attention_fwd_wrapper" in text
    assert "dot_product_attention_bwd_wrapper" in text
