"""Pictures as codes: the VQ tokenizer of a model, its folder and its export."""

import atexit
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.autoencoders import vqgan
from jaxft.models.autoencoders.vq_config import JANUS, VQConfig, check_codes
from jaxft.models.autoencoders.vqgan import VQModel
from jaxft.nn.pixels import to_float, to_pixels
from jaxft.tasks.common.encoded import fingerprint
from jaxft.tasks.common.image_metrics import psnr, ssim
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles, Tensors, write_sharded
from jaxft.weights.folders.diffusers import open_component
from jaxft.weights.folders.transformers import Source, side_files
from jaxft.weights.rules import Rule, renamed
from jaxft.weights.transfer import Part
from jaxft.weights.views import Mapped, Renamed

CODED_TOGETHER = 16  # pictures in one call of the tokenizer
FINDS = ("encoder.", "quant_conv.", "quantize.")  # the parameters that decide a picture's codes
CODEBOOK_KEY = "quantize.embedding.weight"
BEST = 100.0  # dB, for an exact reconstruction, whose PSNR is infinite


class CodedPictures(NamedTuple):
    """A batch of pictures, encoded and decoded again."""

    codes: Int[np.ndarray, "B Y X"]
    pixels: UInt8[np.ndarray, "B Y2 X2 3"]
    psnr: np.ndarray
    ssim: np.ndarray


class ImageTokenizer:
    """A VQ tokenizer in fp32 on the first device. Messages name it by `spec`.

    It does not belong to a run's parameters. It never trains, and an export copies its files.
    """

    def __init__(self, spec: str, source: Source):
        self.spec, self.source = spec, source
        self.cfg = VQConfig.from_hf(source.config, f"{source.folder}/config.json")
        self.template = jax.eval_shape(lambda k: VQModel(self.cfg, key=k), jax.random.key(0))
        self.mesh = one_device_mesh()

    @cached_property
    def params(self) -> Params:
        """The weights, read when pictures are first encoded or decoded."""
        if self.source.tensors is None:
            raise UserError(
                f"init='random' cannot make {self.spec}: a Janus export copies its image encoder"
                " from the pretrained weights; use init='pretrained'"
            )
        leaves, rules = describe(self.template), vqgan.rules(self.cfg)
        part = Part("", self.spec, self.source.tensors, rules, {}, vqgan.IGNORE)
        with jax.set_mesh(self.mesh):
            places = shardings(leaves, self.mesh)
            return transfer.load(part, leaves, places, jnp.float32, set(leaves))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights that decide a picture's codes."""
        return fingerprint(self.params, FINDS, self.cfg.l2)

    @property
    def files(self) -> dict[str, Path | bytes]:
        """All files of its folder that an export copies, under vq/."""
        folder = self.source.folder
        assert folder is not None
        files = {**side_files(folder), **self.source.side_files}
        if not isinstance(self.source.tensors, TensorFiles):
            files = _rewritten(self.source, files)
        return {f"vq/{name}": path for name, path in files.items()}

    def reconstruct(self, pixels: UInt8[np.ndarray, "B Y X 3"]) -> CodedPictures:
        """Encode any number of pictures and decode their codes."""
        with jax.set_mesh(self.mesh):
            made = [self._reconstruct(self.params, rows) for rows in _cut(pixels)]
        return CodedPictures(*(_joined(arrays, len(pixels)) for arrays in zip(*made, strict=True)))

    def decode(self, codes: Int[np.ndarray, "B Y X"]) -> UInt8[np.ndarray, "B Y2 X2 3"]:
        """Return the pictures of any number of code grids.

        Raises UserError for a code that the codebook lacks.
        """
        check_codes(codes, self.cfg, self.spec)
        with jax.set_mesh(self.mesh):
            made = [self._decode(self.params, rows) for rows in _cut(codes)]
        return _joined(made, len(codes))

    @partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Params, pixels: Any) -> CodedPictures:
        model, x = bind(self.template, params), to_float(pixels)
        found = model.encode(x)
        y = jnp.clip(model.decode(found.quantized), -1.0, 1.0)
        return CodedPictures(found.codes, to_pixels(y), jnp.minimum(psnr(x, y), BEST), ssim(x, y))  # type: ignore[arg-type]

    @partial(jax.jit, static_argnums=0)
    def _decode(self, params: Params, codes: Any) -> Any:
        model = bind(self.template, params)
        return to_pixels(model.decode_codes(jnp.asarray(codes, jnp.int32)))


def open_tokenizer(spec: str) -> ImageTokenizer:
    """Open the tokenizer of a folder, or of its vq/, with the codebook of an export."""
    source = open_component(spec, "vq")
    assert source.tensors is not None
    cfg = VQConfig.from_hf(source.config, f"{source.folder}/config.json")
    tensors = _stock_keyed(source.tensors, cfg)
    if cfg.l2 and CODEBOOK_KEY in set(tensors.keys()):
        stored = jnp.asarray(tensors.read(CODEBOOK_KEY), jnp.float32)
        if vqgan.unit_codebook(cfg, stored) is not stored:
            tensors = unit_rows(tensors, cfg, CODEBOOK_KEY)
    return ImageTokenizer(spec, dataclasses.replace(source, tensors=tensors))


def _stock_keyed(tensors: Tensors, cfg: VQConfig) -> Tensors:
    """Rename tensors with the keys of LlamaGen's own code to those of transformers."""
    keys = list(tensors.keys())
    if cfg.kind != JANUS or not any(".conv_blocks." in key for key in keys):
        return tensors
    pairs = zip(vqgan.original_rules(cfg), vqgan.rules(cfg), strict=True)
    table = [Rule(theirs.key, ours.key) for theirs, ours in pairs]
    kept = [key for key in keys if not any(re.fullmatch(one, key) for one in vqgan.IGNORE)]
    return Renamed(tensors, {(renamed(table, key) or (key,))[0]: key for key in kept})


def unit_rows(tensors: Tensors, cfg: VQConfig, key: str) -> Tensors:
    """Return a checkpoint with a codebook in which transformers' own search finds our codes."""
    unit = partial(vqgan.unit_codebook, cfg)
    return Mapped(tensors, {key: lambda rows: np.asarray(unit(jnp.asarray(rows)))})


def _rewritten(source: Source, files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Return `files` with the weights of `source.tensors`.

    The weights are written to a temporary folder, which is deleted when the process ends.
    """
    tensors = source.tensors
    assert tensors is not None
    folder = Path(tempfile.mkdtemp(prefix="jaxft-vq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    keys = list(tensors.keys())
    infos = {key: tensors.info(key) for key in keys}
    made = write_sharded(folder, ((key, tensors.read(key)) for key in keys), infos)
    others = {name: path for name, path in files.items() if ".safetensors" not in name}
    return {**others, **{path.name: path for path in made}}


def _cut(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield CODED_TOGETHER rows at a time, the last ones filled up.

    A fixed number of rows needs only one compilation.
    """
    for first in range(0, len(rows), CODED_TOGETHER):
        yield np.resize(rows[first : first + CODED_TOGETHER], (CODED_TOGETHER, *rows.shape[1:]))


def _joined(parts: Sequence[Any], count: int) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])[:count]
