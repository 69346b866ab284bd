"""Latent moments and text embeddings of a training set, computed once by frozen encoders."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh
from jaxft.core.step import cast
from jaxft.data.cache import ArrayCache, fill
from jaxft.models.pipelines.stable_diffusion import NOTHING, SOURCE
from jaxft.nn.pixels import to_float
from jaxft.tasks.common.encoded import (
    Row,
    fill_up,
    fingerprint,
    keep_pixels,
    store_pictures,
    tell,
    wait_for_others,
)
from jaxft.tasks.diffusion.opened import OpenedPipeline
from jaxft.tasks.diffusion.rows import PictureRows, Stores, ids_key
from jaxft.weights.transfer import to_host

ENCODED_TOGETHER = 16  # pictures or captions that are encoded together


def encode(
    opened: OpenedPipeline, params: Params, chosen: set[str], sets: Sequence[PictureRows]
) -> None:
    """Store the moments of all pictures and, while no text encoder trains, all embeddings.

    Raises UserError where the VAE trains.
    """
    if any(path.startswith("vae.") for path in chosen):
        raise UserError(
            f"trainable={opened.cfg.trainable!r} trains the VAE, which the noise's error would"
            r" only spoil; take unet\..* or (unet|text_encoder.*)\..*, or task=autoencoder"
        )
    if not opened.options.cache or not sets:
        return
    cfg, dtype = opened.model_cfg, str(opened.dtype)
    local = Encoders(opened.template, opened.dtype, params)
    folder = Path(opened.options.cache).expanduser()
    name = fingerprint(local.params, ("vae.encoder.", "vae.quant_conv."), "moments", dtype, cfg.vae)
    moments, texts = ArrayCache(folder, name, jax.process_index()), None
    if cfg.sees != SOURCE:
        pixels = ArrayCache(folder, "pixels", jax.process_index())
        for rows in sets:
            keep_pixels(pixels, rows.shares[0].images, rows.shown)
    if cfg.sees == NOTHING:
        for images in (share.images for rows in sets for share in rows.shares):
            tell("moments", store_pictures(moments, images, local.moments, ENCODED_TOGETHER))
    else:
        moments = None
        print("moments are not cached: the UNet sees pictures, encoded in each step", flush=True)
    if not any(path.startswith("text_encoder") for path in chosen):
        name = fingerprint(local.params, ("text_encoder",), "texts", dtype, cfg.texts)
        texts = ArrayCache(folder, name, jax.process_index())
        captions = [rows.caption(i) for rows in sets for i in range(len(rows))]
        made = store_texts(texts, captions, opened.captions, local.texts, ENCODED_TOGETHER)
        tell("embeddings", made)
    for rows in sets:
        rows.use(Stores(moments, texts))


class Encoders:
    """VAE and text encoders on this process's first device, to fill caches without collectives.

    `template` is a `StableDiffusion`; `params` may lie anywhere.
    """

    def __init__(self, template: Any, dtype: Any, params: Params):
        self.template, self.dtype, self.mesh = template, dtype, one_device_mesh()
        device = self.mesh.devices.flat[0]
        self.params = {
            path: jax.device_put(to_host(x), device)
            for path, x in params.items()
            if path.startswith(("vae.", "text_encoder"))
        }
        leaves = describe(template)
        self.rest = {path: leaf.shape for path, leaf in leaves.items() if path not in self.params}

    def moments(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 pictures to fp32 mean and logvar."""
        with jax.set_mesh(self.mesh):
            made = self._moments(self.params, pixels)
        return {"mean": np.asarray(made.mean), "logvar": np.asarray(made.logvar)}

    def texts(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Ids (B, E, T) to embeddings."""
        with jax.set_mesh(self.mesh):
            made = self._texts(self.params, ids)
        pairs = {"context": made.context, "pooled": made.pooled}
        return {name: np.asarray(x) for name, x in pairs.items() if x is not None}

    def _bound(self, params: Params) -> Any:
        """The whole model; what is not used of it costs nothing."""
        unused = {path: jnp.zeros(shape, self.dtype) for path, shape in self.rest.items()}
        return bind(self.template, {**unused, **cast(params, self.dtype)})

    @partial(jax.jit, static_argnums=0)
    def _moments(self, params: Params, pixels: Any) -> Any:
        return self._bound(params).vae.encode(to_float(pixels).astype(self.dtype))

    @partial(jax.jit, static_argnums=0)
    def _texts(self, params: Params, ids: Any) -> Any:
        return self._bound(params).encode_text(ids, dtype=self.dtype)


def store_texts(
    cache: ArrayCache,
    captions: Sequence[str],
    tokenize: Callable[[str], np.ndarray],
    encode: Callable[[np.ndarray], Mapping],
    batch: int,
) -> Iterator[tuple[int, int]]:
    """Embeddings of every caption that has none yet."""

    def compute(chosen: list[np.ndarray]) -> list[Row]:
        made = encode(fill_up(np.stack(chosen), batch))
        return [{name: made[name][i] for name in made} for i in range(len(chosen))]

    def read(places: list[int]) -> list[np.ndarray]:
        return [ids[place] for place in places]

    ids = [tokenize(caption) for caption in sorted(set(captions))]
    keys = [ids_key(one) for one in ids]
    host, hosts = jax.process_index(), jax.process_count()
    yield from fill(cache, read, keys, compute, batch, host=host, hosts=hosts)
    wait_for_others(cache, keys)
