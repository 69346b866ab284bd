"""VQ tokenizers: images to codes and back, of Janus, LlamaGen, taming-transformers and aMUSEd."""

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

UNIT_TOLERANCE = 1e-6  # how far from 1 the length of a row may be that counts as unit


class Quantized(NamedTuple):
    """Images as codes. Rows run from the top, and in each from the left (row-major).

    quantized: the codebook's rows of the codes, as the decoder takes them; gradients reach the
    codebook alone. z: what was quantized, of unit length if cfg.l2; gradients reach the encoder.
    Training decodes `straight_through(z, quantized)`.
    """

    codes: Int[Array, "B Y X"]
    quantized: Float[Array, "B Y X C"]
    z: Float[Array, "B Y X C"]


class Codebook(nnx.Module):
    """The table of code vectors; whole on every device, for every pixel is compared to all."""

    def __init__(self, codes: int, dim: int, *, key: PRNGKeyArray):
        bound = 1 / codes  # taming's and LlamaGen's start
        table = jax.random.uniform(key, (codes, dim), minval=-bound, maxval=bound)
        self.embedding = nnx.Param(table, axes=(None, None))

    def nearest(self, z: Float[Array, "B Y X C"], *, l2: bool) -> Int[Array, "B Y X"]:
        """The code of the row nearest to each z, the lowest where several are; in fp32.

        `l2` compares directions: z has unit length then, and the rows are given it.
        """
        table = self.embedding[...].astype(jnp.float32)
        table = normalised(table) if l2 else table
        # |z - e|^2 without |z|^2, which does not depend on e. Rounded products would flip codes.
        products = jnp.einsum("byxc,kc->byxk", z, table, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(jnp.square(table), axis=-1) - 2 * products
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def __call__(self, codes: Int[Array, "B Y X"], *, unit: bool) -> Float[Array, "B Y X C"]:
        """The rows of the codes in fp32, of unit length if `unit`."""
        rows = gather_rows(self.embedding[...].astype(jnp.float32), codes)
        return normalised(rows) if unit else rows


class VQModel(nnx.Module):
    """The whole tokenizer; it computes in the dtype of its input and quantizes in fp32.

    remat: as the VAE's.
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
        """Images (B, Y, X, 3) within [-1, 1] to codes, `cfg.factor` times smaller."""
        z = self.quant_conv(self.encoder(images, remat)).astype(jnp.float32)
        z = normalised(z) if self.cfg.l2 else z
        codes = self.quantize.nearest(z, l2=self.cfg.l2)
        return Quantized(codes, self.quantize(codes, unit=self.cfg.unit_lookup), z)

    def decode_codes(self, codes: Int[Array, "B Y X"]) -> Float[Array, "B Y2 X2 F"]:
        """Codes below cfg.codes to images, mostly within [-1, 1]; in fp32."""
        return self.decode(self.quantize(codes, unit=self.cfg.unit_lookup))

    def decode(self, quantized: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        """Code vectors to images, mostly within [-1, 1]."""
        return self.decoder.conv_out(self.features(quantized))

    def features(
        self, quantized: Float[Array, "B Y X C"], remat: str = "none"
    ) -> Float[Array, "B Y2 X2 F"]:
        """What `decoder.conv_out` makes the image from."""
        return self.decoder.features(self.post_quant_conv(quantized), remat)


def normalised(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """x / max(|x|, 1e-12) over the last dim, as torch's normalize; with a gradient at zero."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


def straight_through(
    z: Float[Array, "B Y X C"], quantized: Float[Array, "B Y X C"]
) -> Float[Array, "B Y X C"]:
    """`quantized` with the gradient of z: van den Oord et al. 2017, arXiv:1711.00937, sec. 3.2."""
    return z + jax.lax.stop_gradient(quantized - z)


class QuantiserLosses(NamedTuple):
    """Means over each image's codes and channels, without weights."""

    codebook: Float[Array, "B"]
    commitment: Float[Array, "B"]


def losses(z: Float[Array, "B Y X C"], quantized: Float[Array, "B Y X C"]) -> QuantiserLosses:
    """|quantized - sg z|^2 and |sg quantized - z|^2; the second takes beta, as LlamaGen has it.

    diffusers and transformers put beta on the first by an old mistake of taming's.
    """
    held = jax.lax.stop_gradient(quantized), jax.lax.stop_gradient(z)
    over = (1, 2, 3)
    codebook = jnp.mean(jnp.square(quantized - held[1]), axis=over)
    return QuantiserLosses(codebook, jnp.mean(jnp.square(held[0] - z), axis=over))


class Usage(NamedTuple):
    """How much of a codebook lives: the share of codes ever seen, and exp(entropy) of all seen."""

    used: Float[Array, ""]
    perplexity: Float[Array, ""]


def codebook_usage(counts: Int[Array, "K"]) -> Usage:
    """From how often each code was seen (jnp.bincount(codes.ravel(), length=cfg.codes))."""
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)))
    return Usage(jnp.mean(counts > 0, dtype=jnp.float32), jnp.exp(entropy))


def unit_codebook(cfg: VQConfig, table: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """The codebook as an export writes it: with rows of unit length if cfg.l2.

    transformers searches with the rows as they are stored: only so does it find our codes. A
    table whose rows have it within UNIT_TOLERANCE comes back as it is, bit for bit.
    """
    lengths = jnp.linalg.norm(table, axis=-1)
    if not cfg.l2 or bool(jnp.all(jnp.abs(lengths - 1) < UNIT_TOLERANCE)):
        return table
    return normalised(table)


# LlamaGen's statistics of its training; taming's discriminator and perceptual network.
IGNORE = (r"quantize\.codebook_used", r"loss\..*")
_CODEBOOK = Rule("quantize.embedding.weight", "quantize.embedding")


def rules(cfg: VQConfig) -> tuple[Rule, ...]:
    """The table for the folder's own layout: transformers' JanusVQVAE or diffusers' VQModel.

    Both count up blocks as we do, from the codes.
    """
    ups = tuple(range(len(cfg.widths)))
    return (_CODEBOOK, *(vae.ldm_rules(ups) if cfg.kind == JANUS else vae.RULES))


def original_rules(cfg: VQConfig) -> tuple[Rule, ...]:
    """The table for checkpoints of LlamaGen, and of Janus after `gen_vision_model.`."""
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
