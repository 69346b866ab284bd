"""The projection of all models, with the slot of a LoRA adapter, and the embedding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.params import NEW_TOKEN_ROLE
from jaxft.kernels.matmul import matmul


class Adapter(NamedTuple):
    """Settings of one adapter.

    scale: alpha / r, unless layers of a stack have different ones. dropout: the share of its input
    that is dropped. stream: folded into the PRNG keys, so that the dropout masks of two adapters
    differ.
    """

    scale: float
    dropout: float = 0.0
    stream: int = 0


class Linear(nnx.Module):
    """Projection y = x W + b, and with an adapter + scale * (x A) B.

    With DoRA it is y = m / |W + scale * A B| * (x W + scale * (x A) B) + b. The norm is that of
    each output over its inputs. It has no gradient. m = 0 marks a layer without an adapter.
    x [..., *in_shape] -> y [..., *out_shape]. W [*in_shape, *out_shape], A [*in_shape, r],
    B [r, *out_shape], m and b [*out_shape]. `axes` are the logical axes of W. In a stack whose
    layers have different scales, `lora_s` holds them. With LoKr the update is `kronecker`.
    Source of LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. Source of DoRA: Liu et al. 2024,
    arXiv:2402.09353, eq. 5 and section 4.3.
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
        self.kernel: Any = nnx.Param(  # or a quantised kernel, which is read in the same way
            std * jax.random.normal(key, shape), axes=axes, inputs=len(in_shape)
        )
        out_axes = axes[len(in_shape) :]
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_shape), axes=out_axes) if bias else None)
        # The slots of an adapter, which `lora.add` fills. nnx.data lets None become a parameter.
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_k: nnx.Param | None = nnx.data(None)
        self.lora_m: nnx.Param | None = nnx.data(None)
        self.lora_s: nnx.Param | None = nnx.data(None)
        self.adapter = Adapter(1.0)
        self.inputs = len(in_shape)

    def __call__(
        self, x: Float[Array, "..."], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """Return y in x's dtype.

        keys: one PRNG key for each row of x, for the dropout of the adapter. None: no dropout.
        """
        y: Array = matmul(x, self.kernel[...], self.inputs)
        if self.lora_a is not None and self.lora_b is not None:
            inner = self._dropped(x, keys)
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            if self.lora_k is not None:
                blocks = inner.reshape(*x.shape[:-1], -1, len(a))  # [..., Q, in / Q]
                update = kronecker(jnp.tensordot(blocks, a, 1), self.lora_k[...], b)
            else:
                low = jnp.tensordot(inner, a, self.inputs)  # [..., r]
                update = jnp.tensordot(low, b, 1)  # [..., *out_shape]
            update = self._scale(x.dtype) * update
            if self.lora_m is not None:
                factors = self.lora_a[...], self.lora_b[...]
                scale = self._scale(jnp.float32)
                gain = dora_gain(self.kernel[...], self.lora_m[...], *factors, scale, self.inputs)
                whole: Array = y if inner is x else matmul(inner, self.kernel[...], self.inputs)
                update = (gain - 1).astype(x.dtype) * whole + gain.astype(x.dtype) * update
            y = y + update
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
        inner = self._dropped(x, keys)
        low = jnp.tensordot(inner, self.lora_a[...].astype(x.dtype), self.inputs)  # [..., r]
        low = self._scale(x.dtype) * low
        return jnp.concatenate([x, low.astype(x.dtype)], axis=-1)  # [..., D + r]

    def wide_kernel(self) -> Float[Array, "E F"]:
        """Return the kernel [D, F], concatenated with its adapter's B to [D + r, F]."""
        kernel: Array = self.kernel[...]
        if self.lora_b is None:
            return kernel
        return jnp.concatenate([kernel, self.lora_b[...].astype(kernel.dtype)])  # [D + r, F]

    def _scale(self, dtype: Any) -> Any:
        return self.adapter.scale if self.lora_s is None else self.lora_s[...].astype(dtype)

    def _dropped(self, x: Array, keys: PRNGKeyArray | None) -> Float[Array, "..."]:
        """Return the adapter's input: x, with dropout if there are keys."""
        if keys is None or self.adapter.dropout == 0:
            return x
        return dropout(x, keys, self.adapter)


def kronecker(
    low: Float[Array, "... Q R"], k: Float[Array, "Q P"], b: Float[Array, "R O"]
) -> Float[Array, "... F"]:
    """Return the update of LoKr [..., P * O] of an input whose Q blocks are multiplied by A.

    It is x (K x A B) with the product x of Kronecker, which is never computed: of block q of the
    input, block p of the output has K[q, p] (x_q A) B. Source: Yeh et al. 2023, arXiv:2309.14859.
    """
    mixed = jnp.einsum("...qr,qp->...pr", low, k.astype(low.dtype))  # [..., P, R]
    made = jnp.tensordot(mixed, b, 1)  # [..., P, O]
    return made.reshape(*made.shape[:-2], -1)


def dora_gain(
    kernel: Float[Array, "..."],
    m: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    scale: Any,
    inputs: int,
) -> Float[Array, "..."]:
    """Return m / |W + scale * A B| of each output in fp32, and 1 where m is 0.

    W [*ins, *outs], A [*ins, r], B [r, *outs] and m [*outs], with `inputs` dims in *ins. The square
    of the norm is |W|^2 + 2 scale W.AB + scale^2 |AB|^2. A B is never computed, because it is as
    large as W.
    """
    kernel = jax.lax.stop_gradient(kernel)
    a, b = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (a, b))
    square = jnp.square(kernel.astype(jnp.float32)).sum(range(inputs))  # [*outs]
    rows = jnp.moveaxis(a, -1, 0)  # [r, *ins]
    cross: Array = matmul(rows.astype(kernel.dtype), kernel, inputs)  # [r, *outs]
    gram = jnp.tensordot(rows, a, inputs)  # [r, r]
    product = jnp.tensordot(gram, b, 1)  # [r, *outs]
    square += (b * (2 * scale * cross.astype(jnp.float32) + scale**2 * product)).sum(0)
    norm = jnp.sqrt(jnp.maximum(square, 0))
    ratio = m.astype(jnp.float32) / jnp.where(norm == 0, 1, norm)
    return jnp.where(m == 0, 1, ratio)


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


class TrainedRows(nnx.Module):
    """Rows of an embedding that train while its table is frozen: those of `ids`, [n, D]."""

    def __init__(self, table: Float[Array, "V D"], ids: tuple[int, ...]):
        rows = table[jnp.array(ids)].astype(jnp.float32)  # [n, D]
        self.embedding = nnx.Param(rows, axes=(None, "embed"), role=NEW_TOKEN_ROLE)
        self.ids = ids


class Embedding(nnx.Module):
    """Table of row vectors [rows, D]: token ids [...] -> [..., D].

    `tokens` holds rows that replace those of the table, None for none.
    """

    def __init__(self, rows: int, dim: int, *, key: PRNGKeyArray, std: float = 0.02):
        table = std * jax.random.normal(key, (rows, dim))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.tokens: TrainedRows | None = nnx.data(None)

    def __call__(
        self, ids: Int[Array, "..."], dtype: jnp.dtype | None = None
    ) -> Float[Array, "... D"]:
        table = self.embedding[...]
        made = gather_rows(table if dtype is None else table.astype(dtype), ids)
        if self.tokens is None:
            return made
        # The rows of these tokens alone, rather than a changed copy of the whole table.
        same = ids[..., None] == jnp.array(self.tokens.ids)  # [..., n]
        own = self.tokens.embedding[...].astype(made.dtype)[same.argmax(-1)]  # [..., D]
        return jnp.where(same.any(-1, keepdims=True), own, made)

    def table(self) -> Float[Array, "V D"]:
        """Return the whole table, for an output head that is tied to it."""
        table: Array = self.embedding[...]
        if self.tokens is None:
            return table
        return table.at[jnp.array(self.tokens.ids)].set(self.tokens.embedding.astype(table.dtype))


def gather_rows(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Return table[ids] [..., D], from a table that is replicated first.

    If a table is sharded over both dims, indexing makes XLA rematerialise it ("Involuntary full
    rematerialization"). Replication costs one all-gather.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec())
    return table[ids]
