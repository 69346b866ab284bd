"""VQ tokenizers of Janus, LlamaGen, taming-transformers and aMUSEd: images to codes and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vq_config import DIFFUSERS, JANUS, VQConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import REPLICATED_KERNEL, Conv
from jaxft.nn.linear import gather_rows
from jaxft.weights.rules import Rule

UNIT_TOLERANCE = 1e-6  # difference from 1 up to which a row's length counts as unit


class Quantized(NamedTuple):
    """Images as codes, from the top left, in rows.

    quantized: the codebook's rows of the codes, the decoder's input. Its gradients reach only the
    codebook. z: the encoder's output before quantization, of unit length if cfg.l2. Its gradients
    reach the encoder. Training decodes `straight_through(z, quantized)`.
    """

    codes: Int[Array, "B Y X"]
    quantized: Float[Array, "B Y X C"]
    z: Float[Array, "B Y X C"]


class Codebook(nnx.Module):
    """The table of code vectors [K, C].

    It is replicated on all devices, because every pixel is compared with every row.
    """

    def __init__(self, codes: int, dim: int, *, key: PRNGKeyArray):
        bound = 1 / codes  # the initialisation of taming and LlamaGen
        table = jax.random.uniform(key, (codes, dim), minval=-bound, maxval=bound)
        self.embedding = nnx.Param(table, axes=(None, None))

    def nearest(self, z: Float[Array, "B Y X C"], *, l2: bool) -> Int[Array, "B Y X"]:
        """Return the code of the row nearest to each z, the lowest of equal ones, computed in fp32.

        l2: z has unit length, and the rows are scaled to unit length, so that angles are compared.
        """
        table = self.embedding[...].astype(jnp.float32)
        table = normalised(table) if l2 else table
        # |z - e|^2 without |z|^2, which does not depend on e. Rounded products would flip codes.
        precise = jax.lax.Precision.HIGHEST
        products = jnp.einsum("byxc,kc->byxk", z, table, precision=precise)  # [B, Y, X, K]
        distances = jnp.sum(jnp.square(table), axis=-1) - 2 * products  # [B, Y, X, K]
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def __call__(self, codes: Int[Array, "B Y X"], *, unit: bool) -> Float[Array, "B Y X C"]:
        """Return the rows of the codes in fp32, scaled to unit length if `unit`."""
        rows = gather_rows(self.embedding[...].astype(jnp.float32), codes)  # [B, Y, X, C]
        return normalised(rows) if unit else rows


class VQModel(nnx.Module):
    """The whole tokenizer. It computes in the dtype of its input, and quantizes in fp32.

    remat: as in `VAE`.
    """

    def __init__(self, cfg: VQConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        self.cfg = cfg
        self.encoder = vae.VAEEncoder(cfg, key=keys[0])
        self.decoder = vae.VAEDecoder(cfg, key=keys[1])
        latents, dim = cfg.latent_channels, cfg.code_dim
        self.quant_conv = Conv(latents, dim, 1, key=keys[2], axes=REPLICATED_KERNEL)
        self.quantize = Codebook(cfg.codes, dim, key=keys[3])
        self.post_quant_conv = Conv(dim, latents, 1, key=keys[4], axes=REPLICATED_KERNEL)

    def encode(self, images: Float[Array, "B Y X C"], remat: str = "none") -> Quantized:
        """Return the codes of images [B, Y, X, 3] in [-1, 1], `cfg.factor` times smaller."""
        z = self.quant_conv(self.encoder(images, remat)).astype(jnp.float32)
        z = normalised(z) if self.cfg.l2 else z
        codes = self.quantize.nearest(z, l2=self.cfg.l2)
        return Quantized(codes, self.quantize(codes, unit=self.cfg.unit_lookup), z)

    def decode_codes(self, codes: Int[Array, "B Y X"]) -> Float[Array, "B Y2 X2 F"]:
        """Return the images of codes below cfg.codes, in fp32, mostly within [-1, 1]."""
        return self.decode(self.quantize(codes, unit=self.cfg.unit_lookup))

    def decode(self, quantized: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        """Return the images of code vectors, mostly within [-1, 1]."""
        return self.decoder.conv_out(self.features(quantized))

    def features(
        self, quantized: Float[Array, "B Y X C"], remat: str = "none"
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return the input of `decoder.conv_out`."""
        return self.decoder.features(self.post_quant_conv(quantized), remat)


def normalised(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return x / max(|x|, 1e-12) over the last dim, as torch's normalize.

    The gradient at zero is finite.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


def straight_through(
    z: Float[Array, "B Y X C"], quantized: Float[Array, "B Y X C"]
) -> Float[Array, "B Y X C"]:
    """Return `quantized` with the gradient of z.

    Source: van den Oord et al. 2017, arXiv:1711.00937, section 3.2.
    """
    return z + jax.lax.stop_gradient(quantized - z)


class QuantiserLosses(NamedTuple):
    """Means over each image's codes and channels, without weights."""

    codebook: Float[Array, "B"]
    commitment: Float[Array, "B"]


def losses(z: Float[Array, "B Y X C"], quantized: Float[Array, "B Y X C"]) -> QuantiserLosses:
    """Return |quantized - sg z|^2 and |sg quantized - z|^2, where sg stops gradients.

    The factor beta belongs to the second, as in LlamaGen. diffusers and transformers apply it to
    the first, after an old error of taming.
    """
    held = jax.lax.stop_gradient(quantized), jax.lax.stop_gradient(z)
    over = (1, 2, 3)  # all dims but the batch
    codebook = jnp.mean(jnp.square(quantized - held[1]), axis=over)
    return QuantiserLosses(codebook, jnp.mean(jnp.square(held[0] - z), axis=over))


class Usage(NamedTuple):
    """Use of a codebook: the share of codes that occur, and exp(entropy) of their frequencies."""

    used: Float[Array, ""]
    perplexity: Float[Array, ""]


def codebook_usage(counts: Int[Array, "K"]) -> Usage:
    """Return the use of a codebook from the count of each code.

    counts: jnp.bincount(codes.ravel(), length=cfg.codes).
    """
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)))
    return Usage(jnp.mean(counts > 0, dtype=jnp.float32), jnp.exp(entropy))


def unit_codebook(cfg: VQConfig, table: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """Return the codebook for an export, with rows of unit length if cfg.l2.

    transformers compares with the stored rows, so it finds the same codes only if they have unit
    length. If all rows already have it within UNIT_TOLERANCE, the table is returned unchanged.
    """
    lengths = jnp.linalg.norm(table, axis=-1)  # [K]
    if not cfg.l2 or bool(jnp.all(jnp.abs(lengths - 1) < UNIT_TOLERANCE)):
        return table
    return normalised(table)


# Statistics of LlamaGen's training, and taming's discriminator and perceptual network.
IGNORE = (r"quantize\.codebook_used", r"loss\..*")
_CODEBOOK = Rule("quantize.embedding.weight", "quantize.embedding")


def rules(cfg: VQConfig) -> tuple[Rule, ...]:
    """Return the weight table of transformers' JanusVQVAE or diffusers' VQModel.

    Both count up blocks from the codes, as jaxft does.
    """
    ups = tuple(range(len(cfg.widths)))
    return (_CODEBOOK, *(vae.ldm_rules(ups) if cfg.kind == JANUS else vae.RULES))


def original_rules(cfg: VQConfig) -> tuple[Rule, ...]:
    """Return the weight table of LlamaGen's checkpoints, and of Janus after `gen_vision_model.`."""
    # From the names of taming to those of LlamaGen.
    renames = {
        "encoder.down.": "encoder.conv_blocks.",
        "decoder.up.": "decoder.conv_blocks.",
        ".block.": ".res.",
        ".mid.block_1": ".mid.0",
        ".mid.attn_1": ".mid.1",
        ".mid.block_2": ".mid.2",
    }
    table = [_CODEBOOK]
    for rule in vae.ldm_rules(tuple(range(len(cfg.widths)))):
        key = rule.key
        for theirs, original in renames.items():
            key = key.replace(theirs, original)
        table.append(rule._replace(key=key))
    return tuple(table)


ARCHITECTURE = Architecture(
    family="autoencoder",
    class_name=lambda config: "JanusVQVAE" if config.get("model_type") == JANUS else DIFFUSERS,
    config=VQConfig.from_hf,
    module=VQModel,
    rules=rules,
    ignore=lambda cfg: IGNORE,
)
