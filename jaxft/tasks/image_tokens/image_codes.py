"""Pictures as codes: a VQ tokenizer beside the model, its cache, and rows to train on."""

import atexit
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.data.cache import ArrayCache, example_keys
from jaxft.data.images.dataset import ImageSet, to_float
from jaxft.models.autoencoders import vqgan
from jaxft.models.autoencoders.vq_config import JANUS, VQConfig, check_codes
from jaxft.models.autoencoders.vqgan import VQModel
from jaxft.tasks.common.image_metrics import psnr, ssim
from jaxft.tasks.common.pictures import grid
from jaxft.tasks.diffusion.latents import Row, fingerprint, store_moments
from jaxft.tasks.image_tokens.image_layout import Layout, encode_prompt
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles, Tensors, write_sharded
from jaxft.weights.folders.diffusers import Renamed, open_component
from jaxft.weights.folders.transformers import SIDE_FILES, Source
from jaxft.weights.patch import Mapped
from jaxft.weights.rules import Rule, renamed
from jaxft.weights.transfer import Part

ROWS = 16  # pictures that are encoded or decoded together
FINDS = ("encoder.", "quant_conv.", "quantize.")  # the parameters that decide a picture's codes
CODEBOOK = "quantize.embedding.weight"
BLOCK = 1024  # cached grids that are compared at once
BEST = 100.0  # dB: a picture that comes back exactly has no finite PSNR
WORST = 8  # pictures of a reconstruction report


class Reconstruction(NamedTuple):
    """A batch of pictures through the tokenizer and back."""

    codes: Int[np.ndarray, "B Y X"]
    pixels: UInt8[np.ndarray, "B Y2 X2 3"]
    psnr: np.ndarray
    ssim: np.ndarray


class ImageTokenizer:
    """A VQ tokenizer, fp32 on the first device; `spec` is how messages call it.

    It belongs to no run's parameters: nothing of it trains, an export copies its files.
    """

    def __init__(self, spec: str, source: Source):
        self.spec, self.source = spec, source
        self.cfg = VQConfig.from_hf(source.config, f"{source.folder}/config.json")
        self.template = jax.eval_shape(lambda k: VQModel(self.cfg, key=k), jax.random.key(0))
        leaves, rules = describe(self.template), vqgan.rules(self.cfg)
        part = Part("", spec, self.source.tensors, rules, {}, vqgan.IGNORE)
        self.mesh = one_device_mesh()
        places = shardings(leaves, self.mesh)
        self.params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
        self.fingerprint = fingerprint(self.params, FINDS, self.cfg.l2)

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Everything of its folder that an export copies, under vq/."""
        folder = self.source.folder
        assert folder is not None
        kept = {path.name: path for pattern in SIDE_FILES for path in folder.glob(pattern)}
        files = {**kept, **self.source.side_files}
        if not isinstance(self.source.tensors, TensorFiles):
            files = _rewritten(self.source, files)
        return {f"vq/{name}": path for name, path in files.items()}

    def reconstruct(self, pixels: UInt8[np.ndarray, "B Y X 3"]) -> Reconstruction:
        """Any number of pictures."""
        with jax.set_mesh(self.mesh):
            made = [self._reconstruct(self.params, rows) for rows in _cut(pixels)]
        return Reconstruction(*(_joined(arrays, len(pixels)) for arrays in zip(*made, strict=True)))

    def decode(self, codes: Int[np.ndarray, "B Y X"]) -> UInt8[np.ndarray, "B Y2 X2 3"]:
        """Pictures of any number of code grids; UserError where the codebook has no such code."""
        check_codes(codes, self.cfg, self.spec)
        with jax.set_mesh(self.mesh):
            made = [self._decode(self.params, rows) for rows in _cut(codes)]
        return _joined(made, len(codes))

    @partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Params, pixels: Any) -> Reconstruction:
        model, x = bind(self.template, params), to_float(pixels)
        found = model.encode(x)
        y = jnp.clip(model.decode(found.quantized), -1.0, 1.0)
        return Reconstruction(found.codes, _to_pixels(y), jnp.minimum(psnr(x, y), BEST), ssim(x, y))  # type: ignore[arg-type]

    @partial(jax.jit, static_argnums=0)
    def _decode(self, params: Params, codes: Any) -> Any:
        model = bind(self.template, params)
        return _to_pixels(model.decode_codes(jnp.asarray(codes, jnp.int32)))


def open_tokenizer(spec: str) -> ImageTokenizer:
    """The tokenizer of a folder, or of its vq/, its codebook as an export writes it."""
    source = open_component(spec, "vq")
    assert source.tensors is not None
    cfg = VQConfig.from_hf(source.config, f"{source.folder}/config.json")
    tensors = _stock_keyed(source.tensors, cfg)
    if cfg.l2 and CODEBOOK in set(tensors.keys()):
        stored = jnp.asarray(tensors.read(CODEBOOK), jnp.float32)
        if vqgan.unit_codebook(cfg, stored) is not stored:
            tensors = unit_rows(tensors, cfg, CODEBOOK)
    return ImageTokenizer(spec, dataclasses.replace(source, tensors=tensors))


def _stock_keyed(tensors: Tensors, cfg: VQConfig) -> Tensors:
    """The tensors by transformers' names, where they have those of LlamaGen's own code."""
    keys = list(tensors.keys())
    if cfg.kind != JANUS or not any(".conv_blocks." in key for key in keys):
        return tensors
    pairs = zip(vqgan.original_rules(cfg), vqgan.rules(cfg), strict=True)
    table = [Rule(theirs.key, ours.key) for theirs, ours in pairs]
    kept = [key for key in keys if not any(re.fullmatch(one, key) for one in vqgan.IGNORE)]
    return Renamed(tensors, {(renamed(table, key) or (key,))[0]: key for key in kept})


def unit_rows(tensors: Tensors, cfg: VQConfig, key: str) -> Tensors:
    """A checkpoint whose codebook transformers' own search finds our codes in."""
    unit = partial(vqgan.unit_codebook, cfg)
    return Mapped(tensors, {key: lambda rows: np.asarray(unit(jnp.asarray(rows)))})


def _rewritten(source: Source, files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """`files` with the weights as `source.tensors` are, in a folder that goes with the process."""
    tensors = source.tensors
    assert tensors is not None
    folder = Path(tempfile.mkdtemp(prefix="jaxft-vq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    keys = list(tensors.keys())
    infos = {key: tensors.info(key) for key in keys}
    made = write_sharded(folder, ((key, tensors.read(key)) for key in keys), infos)
    others = {name: path for name, path in files.items() if ".safetensors" not in name}
    return {**others, **{path.name: path for path in made}}


def _to_pixels(images: jax.Array) -> jax.Array:
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _cut(rows: np.ndarray) -> Iterator[np.ndarray]:
    """ROWS at a time, the last filled up, so that one compiled function serves."""
    for first in range(0, len(rows), ROWS):
        yield np.resize(rows[first : first + ROWS], (ROWS, *rows.shape[1:]))


def _joined(parts: Sequence[Any], count: int) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])[:count]


class CodeRows:
    """A picture set as rows of codes and prompts; indexing is safe in threads.

    `cut` counts the captions that were too long, `width` is the longest prompt's count of ids: what
    all are padded to. Codes are there after `cache`.
    """

    def __init__(self, images: ImageSet, layout: Layout, tokenizer: Any):
        self.images, self.layout, self.tokenizer = images, layout, tokenizer
        self.store: ArrayCache | None = None
        self._keys: tuple[str, ...] = ()
        prompts = [self._prompt(i) for i in range(len(images.records))]
        self.cut = sum(prompt.cut for prompt in prompts)
        self.width = max((len(prompt.ids) for prompt in prompts), default=0) or 1

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return repr(self.images)

    def cache(self, store: ArrayCache, vq: ImageTokenizer) -> None:
        """Encode the pictures whose codes `store` lacks, and serve rows from there."""

        def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
            made = vq.reconstruct(pixels)
            codes = made.codes.astype(vq.cfg.code_dtype)
            return {"codes": codes, "psnr": made.psnr, "ssim": made.ssim}

        done = total = 0
        for done, total in store_moments(store, self.images, encode, ROWS):
            if done % (64 * ROWS) == 0:
                print(f"encoding pictures: {done} of {total}", flush=True)
        if total:
            print(f"encoded {done} pictures of {self.images.records.spec}", flush=True)
        self.store, self._keys = store, example_keys(self.images)

    def caption(self, index: int) -> str:
        return self.images.captions[index]

    def stored(self, index: int) -> Row:
        """The picture's codes (Y, X), and the PSNR and SSIM of what the tokenizer makes of them."""
        assert self.store is not None
        return self.store.get(self._keys[index])

    def __getitem__(self, index: int) -> Row:
        """codes [S], prompt [C] padded on the right, its length, and weight 1."""
        ids = self._prompt(index).ids
        prompt = np.full(self.width, self.layout.pad, np.int32)
        prompt[: len(ids)] = ids
        return {
            "codes": self.stored(index)["codes"].ravel(),
            "prompt": prompt,
            "length": np.int32(len(ids)),  # type: ignore[dict-item]
            "weights": np.float32(1),  # type: ignore[dict-item]
        }

    def blocks(self) -> Iterator[Int[np.ndarray, "B S"]]:
        """The codes of all pictures, BLOCK at a time."""
        for first in range(0, len(self), BLOCK):
            some = range(first, min(first + BLOCK, len(self)))
            yield np.stack([self.stored(i)["codes"].ravel() for i in some])

    def _prompt(self, index: int) -> Any:
        return encode_prompt(self.layout, self.tokenizer, self.caption(index))


def code_counts(rows: CodeRows, vq: ImageTokenizer) -> Int[np.ndarray, " K"]:
    """How often each code stands in the cache; UserError where the codebook has no such code."""
    counts = np.zeros(vq.cfg.codes, np.int64)
    for block in rows.blocks():
        check_codes(block, vq.cfg, f"the cache of {rows.images.records.spec}")
        counts += np.bincount(block.ravel(), minlength=vq.cfg.codes)
    return counts


def entropy(counts: Int[np.ndarray, " K"]) -> float:
    """Of the codes as independent draws, nats: what a model of their frequencies alone reaches."""
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def nearest(rows: CodeRows, grids: Int[np.ndarray, "N S"]) -> np.ndarray:
    """The Hamming distance of each grid to the nearest of all cached ones, as a share; [N].

    0 is a picture of the set, code for code; memory is that of one block.
    """
    best = np.ones(len(grids))
    for block in rows.blocks():
        for i, codes in enumerate(grids):
            best[i] = min(best[i], np.mean(block != codes, axis=1).min())
    return best


class Ceiling(NamedTuple):
    """What the tokenizer alone makes of the pictures: no model above it does better."""

    text: str
    worst: UInt8[np.ndarray, "H W 3"]


def ceiling(rows: CodeRows, vq: ImageTokenizer, cell: int) -> Ceiling:
    """PSNR over the cache, and the pictures that came out worst: target, reconstruction."""
    found = np.array([rows.stored(i)["psnr"] for i in range(len(rows))])
    order = np.argsort(found, kind="stable")[:WORST]
    made = vq.decode(np.stack([rows.stored(int(i))["codes"] for i in order]))
    pairs = [(rows.images[int(i)].pixels, one) for i, one in zip(order, made, strict=True)]
    captions = [f"{found[i]:.1f} dB {rows.caption(int(i))}" for i in order]
    text = (
        f"tokenizer ceiling: {len(found)} pictures come back at {found.mean():.1f} dB PSNR on"
        f" average, {np.quantile(found, 0.05):.1f} at the 5 % worst, {found.min():.1f} at worst"
    )
    return Ceiling(text, grid(pairs, captions, ("target", "reconstruction"), cell))
