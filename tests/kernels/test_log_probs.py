"""Log-probabilities of each token by chunks: their sums by segment, and a cotangent for each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxft.core.sharding import batch_sharding, make_mesh, spec
from jaxft.kernels.cross_entropy import linear_log_probs
from tests.kernels.test_cross_entropy import B, D, T, V, data, jit, relative

SEGMENTS = 3


def dense(hidden, head, targets, *, vocab_first, soft_cap=None):
    logits = hidden.astype(jnp.float32) @ (head.T if vocab_first else head)
    logits = soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def by_segment(function, hidden, head, targets, weights, segments):
    """A loss that is nonlinear in the sum of every segment, so that each has its own cotangent."""
    each = function(hidden, head, targets) * weights
    sums = jnp.einsum("bt,bts->bs", each, jax.nn.one_hot(segments, SEGMENTS))
    return -jax.nn.log_sigmoid(sums[:, 0] - sums[:, 1]).sum() + jnp.square(sums[:, 2]).sum() / 99


def segment_ids():
    return np.sort(np.random.default_rng(5).integers(0, SEGMENTS, (B, T)), axis=1)


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize(("vocab_first", "soft_cap"), [(True, None), (False, None), (True, 3.0)])
@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_b6_sums_of_segments_and_their_gradients_equal_the_dense_formula(
    vocab_first, soft_cap, chunk, argnums
):
    """Also with a frozen head, whose gradients the forward pass computes."""
    arrays, how = (*data(vocab_first), segment_ids()), {"vocab_first": vocab_first}
    how["soft_cap"] = soft_cap
    ours = partial(by_segment, partial(linear_log_probs, chunk=chunk, **how))
    theirs = partial(by_segment, partial(dense, **how))
    total, grads = jit(jax.value_and_grad(ours, argnums))(*arrays)
    want, wanted = jit(jax.value_and_grad(theirs, argnums))(*arrays)
    assert abs(total / want - 1) < 1e-6
    assert max(map(relative, jax.tree.leaves(grads), jax.tree.leaves(wanted))) < 1e-5


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_b6_meshes_agree_with_one_device(shape, argnums):
    arrays = (*data(False), segment_ids())
    loss = partial(by_segment, partial(linear_log_probs, vocab_first=False, chunk=4))
    grad = jit(jax.value_and_grad(loss, argnums))
    want, wanted = grad(*arrays)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        head, rows = NamedSharding(mesh, spec(("embed", "vocab"))), batch_sharding(mesh)
        total, grads = grad(*jax.device_put(arrays, (rows, head, rows, rows, rows)))
    assert abs(total / want - 1) < 1e-6
    assert max(map(relative, jax.tree.leaves(grads), jax.tree.leaves(wanted))) < 1e-5


def test_rows_that_do_not_divide_over_the_mesh_are_padded():
    hidden, head, targets, _ = (x[:3] if len(x) == B else x for x in data(True))
    loss = partial(linear_log_probs, vocab_first=True)
    want = loss(hidden, head, targets)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = jit(loss)(hidden, head, targets)
    assert got.shape == want.shape and relative(got, want) < 1e-5


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_b6_logits_of_a_large_vocabulary_never_exist_whole(argnums):
    rows, length, vocab = 8, 4096, 128 * 1024
    s = jax.ShapeDtypeStruct
    args = (
        s((rows, length, 8), jnp.float32),
        s((vocab, 8), jnp.float32),
        s((rows, length), jnp.int32),
    )

    def loss(hidden, head, targets):
        return jnp.square(linear_log_probs(hidden, head, targets, vocab_first=True).sum(1)).sum()

    compiled = jit(jax.grad(loss, argnums)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * length * vocab / 8


def test_bfloat16_hidden_gets_bfloat16_gradients():
    hidden, head, targets, _ = data(True)
    low = jnp.asarray(hidden, jnp.bfloat16)

    def loss(hidden, head):
        return linear_log_probs(hidden, head, targets, vocab_first=True).sum()

    total, (dx, dw) = jit(jax.value_and_grad(loss, (0, 1)))(low, head)
    assert (total.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert dx.shape == (B, T, D) and dw.shape == (V, D)
