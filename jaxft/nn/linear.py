"""The projection of all models, with the slot of a LoRA adapter, and the embedding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.kernels.matmul import matmul


class Adapter(NamedTuple):
    """Settings of one adapter.

    scale: alpha / r. dropout: the share of its input that is dropped. stream: folded into the PRNG
    keys, so that the dropout masks of two adapters differ.
    """

    scale: float
    dropout: float = 0.0
    stream: int = 0


class Linear(nnx.Module):
    """Projection y = x W + b, and with an adapter + scale * (x A) B.

    x [..., *in_shape] -> y [..., *out_shape]. W [*in_shape, *out_shape], A [*in_shape, r],
    B [r, *out_shape], b [*out_shape]. `axes` are the logical axes of W.
    Source of LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        key: PRNGKeyArray,
        bias: bool = False,
        std: float = 0.02,
    ):
        shape = (*in_shape, *out_shape)
        self.kernel = nnx.Param(
            std * jax.random.normal(key, shape), axes=axes, inputs=len(in_shape)
        )
        out_axes = axes[len(in_shape) :]
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_shape), axes=out_axes) if bias else None)
        # The slots of an adapter, which `lora.add` fills. nnx.data lets None become a parameter.
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.adapter = Adapter(1.0)
        self.inputs = len(in_shape)

    def __call__(
        self, x: Float[Array, "..."], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """Return y in x's dtype.

        keys: one PRNG key for each row of x, for the dropout of the adapter. None: no dropout.
        """
        y: Array = matmul(x, self.kernel[...].astype(x.dtype), self.inputs)
        if self.lora_a is not None and self.lora_b is not None:
            low = self._low(x, keys)  # [..., r]
            update = jnp.tensordot(low, self.lora_b[...].astype(x.dtype), 1)  # [..., *out_shape]
            y = y + self.adapter.scale * update
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y

    def wide_input(
        self, x: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Return x [..., D], concatenated with scale * (x A), for a product with `wide_kernel`.

        Without an adapter it is x. keys: as in `__call__`. Dropout acts only on the adapter's
        input. This is for callers that multiply by the kernel elsewhere. If the adapter were added
        to a bf16 kernel, it would be rounded away: its steps are far below the kernel's last bit.
        """
        if self.lora_a is None:
            return x
        low = self.adapter.scale * self._low(x, keys)
        return jnp.concatenate([x, low.astype(x.dtype)], axis=-1)  # [..., D + r]

    def wide_kernel(self) -> Float[Array, "E F"]:
        """Return the kernel [D, F], concatenated with its adapter's B to [D + r, F]."""
        kernel: Array = self.kernel[...]
        if self.lora_b is None:
            return kernel
        return jnp.concatenate([kernel, self.lora_b[...].astype(kernel.dtype)])  # [D + r, F]

    def _low(self, x: Array, keys: PRNGKeyArray | None) -> Float[Array, "... r"]:
        """Return x A, with dropout if there are keys."""
        assert self.lora_a is not None
        if keys is not None and self.adapter.dropout > 0:
            x = dropout(x, keys, self.adapter)
        return jnp.tensordot(x, self.lora_a[...].astype(x.dtype), self.inputs)  # [..., r]


def dropout(
    x: Float[Array, "B ..."], keys: PRNGKeyArray, adapter: Adapter
) -> Float[Array, "B ..."]:
    """Drop elements of x and scale the others up (inverted dropout).

    keys: one a row. The mask of a row depends only on its key, and not on its batch or the mesh.
    """
    keep = 1.0 - adapter.dropout

    def kept(key: PRNGKeyArray) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, adapter.stream), keep, x.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), x / keep, 0).astype(x.dtype)  # [B, ...]


class Embedding(nnx.Module):
    """Table of row vectors [rows, D]: token ids [...] -> [..., D]."""

    def __init__(self, rows: int, dim: int, *, key: PRNGKeyArray, std: float = 0.02):
        table = std * jax.random.normal(key, (rows, dim))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(
        self, ids: Int[Array, "..."], dtype: jnp.dtype | None = None
    ) -> Float[Array, "... D"]:
        table = self.embedding[...]
        return gather_rows(table if dtype is None else table.astype(dtype), ids)


def gather_rows(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Return table[ids] [..., D], from a table that is replicated first.

    If a table is sharded over both dims, indexing makes XLA rematerialise it ("Involuntary full
    rematerialization"). Replication costs one all-gather.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec())
    return table[ids]
