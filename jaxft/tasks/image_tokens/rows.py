"""Pictures as rows of codes and prompts, from a cache that the VQ tokenizer fills."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxft.core.cli.live import progress
from jaxft.core.params import Params
from jaxft.data.cache import ArrayCache
from jaxft.data.images.dataset import ImageSet
from jaxft.data.loader import subset, train_loader
from jaxft.data.sources.images.records import Bad
from jaxft.data.sources.schemes import open_images
from jaxft.models.autoencoders.vq_config import check_codes
from jaxft.tasks import Planned, Sheet
from jaxft.tasks.common.encoded import Row, collate, keep_pixels, store_pictures
from jaxft.tasks.image_tokens.layout import encode_prompt
from jaxft.tasks.image_tokens.opened import OpenedImageModel
from jaxft.tasks.image_tokens.tokenizer import CODED_TOGETHER, ImageTokenizer

WORST = 8  # pictures of a reconstruction sheet
BLOCK = 1024  # cached grids in one comparison


class CodeRows:
    """A picture set as rows of codes and prompts. Implements `jaxft.tasks.Rows`.

    Indexing is safe in threads. cut: the number of captions that were too long. width: the number
    of ids of the longest prompt, to which all are padded. counts: the uses of each code. Codes and
    counts are available after `cache`. shown: the rows whose pictures an evaluation shows.
    """

    def __init__(
        self, opened: OpenedImageModel, images: ImageSet, name: str, shown: Sequence[int] = ()
    ):
        self.opened, self.shown = opened, tuple(shown)
        self.cfg, self.options, self.layout = opened.cfg, opened.options, opened.layout
        self.images, self.name, self.tokenizer = images, name, opened.model.tokenizer
        self.counts: Int[np.ndarray, " K"] | None = None
        self.store: ArrayCache | None = None
        self._keys: tuple[str, ...] = ()
        prompts = [self._prompt(i) for i in range(len(self.images.records))]
        self.cut = sum(prompt.cut for prompt in prompts)
        self.width = max((len(prompt.ids) for prompt in prompts), default=0) or 1

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return repr(self.images)

    @property
    def bad(self) -> tuple[Bad, ...]:
        return self.images.bad

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=collate,
            rows=rows,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        yield _shapes(self.opened, rows.stop - rows.start, self.width)

    def report(self) -> dict[str, Any]:
        counted = {**self.images.report, "truncated_captions": self.cut}
        known = {} if self.counts is None else {"unigram_entropy": entropy(self.counts)}
        return counted | known

    def describe(self) -> str:
        report, options = self.report(), self.options
        kept = {k: report[k] for k in ("cropped", "smaller_than_target", "truncated_captions")}
        counted = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in kept.items() if n)
        mirrored = ", mirrored too" if options.flip else ""
        crops = f", {options.crops} crops each" if options.crops > 1 else ""
        return (
            f"{self.name}: {report['images']} images{mirrored}{crops}"
            f"{f' ({counted})' if counted else ''}"
        )

    def cache(
        self, store: ArrayCache, vq: ImageTokenizer, pixels: ArrayCache | None = None
    ) -> None:
        """Encode the pictures whose codes `store` lacks, and serve rows from there.

        pixels: a cache for the pictures that evaluations show, the worst reconstructions too.
        Raises UserError if the cache holds a code that the codebook lacks.
        """

        def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
            made = vq.reconstruct(pixels)
            codes = made.codes.astype(vq.cfg.code_dtype)
            return {"codes": codes, "psnr": made.psnr, "ssim": made.ssim}

        lowest: list[float] = []  # PSNR of the WORST pictures so far

        def among_worst(row: Row) -> bool:
            lowest[:] = sorted([*lowest, float(row["psnr"])])[:WORST]
            return float(row["psnr"]) <= lowest[-1]

        if pixels is not None:
            keep_pixels(pixels, self.images, self.shown)
        done = total = 0
        for done, total in store_pictures(store, self.images, encode, CODED_TOGETHER, among_worst):
            if done % (64 * CODED_TOGETHER) == 0:
                progress(f"encoding pictures: {done} of {total}")
        if total:
            print(f"encoded {done} pictures of {self.images.records.spec}", flush=True)
        self.store, self._keys = store, self.images.keys
        self.counts = self._count(vq)

    def caption(self, index: int) -> str:
        return self.images.caption(index)

    def stored(self, index: int) -> Row:
        """Return the picture's codes [Y, X], and the PSNR and SSIM of their reconstruction."""
        assert self.store is not None
        return self.store.get(self._keys[self.images.place(index)])

    def __getitem__(self, index: int) -> Row:
        """Return codes [S], prompt [C] padded on the right, its length, and weight 1."""
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
        """Yield the codes of all pictures, BLOCK at a time."""
        for first in range(0, len(self), BLOCK):
            some = range(first, min(first + BLOCK, len(self)))
            yield np.stack([self.stored(i)["codes"].ravel() for i in some])

    def _prompt(self, index: int) -> Any:
        return encode_prompt(self.layout, self.tokenizer, self.caption(index))

    def _count(self, vq: ImageTokenizer) -> Int[np.ndarray, " K"]:
        counts = np.zeros(vq.cfg.codes, np.int64)
        for block in self.blocks():
            check_codes(block, vq.cfg, f"the cache of {self.images.records.spec}")
            counts += np.bincount(block.ravel(), minlength=vq.cfg.codes)
        return counts


def read_rows(opened: OpenedImageModel, spec: str, training: bool) -> CodeRows:
    """Open the pictures of a set. A training set may add mirrored pictures and crops."""
    options, factor = opened.options, opened.model.vq.cfg.factor
    flip, crops = (options.flip, options.crops) if training else (False, 1)
    side = opened.layout.grid[0] * factor
    images = ImageSet(open_images(spec), side, factor, False, flip, crops)
    count = 0 if training else options.eval_generated
    shown = subset(images, count, opened.cfg.seed).ids.tolist() if count else ()
    return CodeRows(opened, images, spec, shown)


def planned(opened: OpenedImageModel) -> Planned:
    """Return rows whose longest prompt has max_caption_tokens."""
    width = opened.layout.max_caption_tokens
    return Planned(_shapes(opened, opened.cfg.batch_size, width), width=width)


def _shapes(opened: OpenedImageModel, count: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` rows with prompts [width]."""
    one = {
        "codes": ((opened.layout.count,), opened.model.vq.cfg.code_dtype),
        "prompt": ((width,), np.int32),
        "length": ((), np.int32),
        "weights": ((), np.float32),
        "sample_ids": ((), np.int32),
    }
    return {k: jax.ShapeDtypeStruct((count, *shape), d) for k, (shape, d) in one.items()}


def encode(
    opened: OpenedImageModel,
    chosen: set[str],
    sets: Sequence[CodeRows],
    load: Callable[[set[str]], Params],
) -> Params:
    """Encode all pictures that the cache lacks, and print the quality of the tokenizer alone."""
    if not sets:
        return {}
    vq, layout, store = opened.model.vq, opened.layout, open_store(opened)
    pixels = ArrayCache(store.folder.parent, "pixels", jax.process_index())
    for rows in sets:
        rows.cache(store, vq, pixels)
    counts = sets[0].counts
    assert counts is not None
    print(
        f"{ceiling(sets[0])}; {np.mean(counts > 0):.0%} of {layout.codes} codes in use, unigram"
        f" entropy {entropy(counts):.3f} of ln K {math.log(layout.codes):.3f}",
        flush=True,
    )
    return {}


def open_store(opened: OpenedImageModel) -> ArrayCache:
    """Return the cache of this tokenizer and size.

    Prints a line if this cache is empty and the folder has others.
    """
    vq, folder = opened.model.vq, Path(opened.options.cache).expanduser()
    name = f"codes {vq.fingerprint} {opened.layout.grid}"
    store = ArrayCache(folder, name, jax.process_index())
    others = [path for path in folder.glob("codes_*") if path != store.folder]
    if others and not len(store):
        print(
            f"cache={opened.options.cache} holds codes of {len(others)} other tokenizers or"
            " sizes, which are not used: pictures are encoded anew",
            flush=True,
        )
    return store


def ceiling(rows: CodeRows) -> str:
    """Return a line on the PSNR of the tokenizer alone over the cache, the limit of any model."""
    found = np.array([rows.stored(i)["psnr"] for i in range(len(rows))])
    return (
        f"tokenizer ceiling: {len(found)} pictures come back at {found.mean():.1f} dB PSNR on"
        f" average, {np.quantile(found, 0.05):.1f} at the 5 % worst, {found.min():.1f} at worst"
    )


def worst_pictures(rows: CodeRows, vq: ImageTokenizer) -> Sheet:
    """Return the pictures with the lowest PSNR: target, reconstruction."""
    found = np.array([rows.stored(i)["psnr"] for i in range(len(rows))])
    order = np.argsort(found, kind="stable")[:WORST]
    if rows.images.kept is not None:
        keep_pixels(rows.images.kept, rows.images, order)
    made = vq.decode(np.stack([rows.stored(int(i))["codes"] for i in order]))
    targets = np.stack([rows.images[int(i)].pixels for i in order])
    captions = tuple(f"{rows.caption(int(i))} ({found[i]:.1f} dB)" for i in order)
    return Sheet(captions, {"target": targets, "reconstruction": made})


def entropy(counts: Int[np.ndarray, " K"]) -> float:
    """Return the entropy of the codes as independent draws, in nats.

    It is the loss of a model that predicts only their frequencies.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def nearest(rows: CodeRows, grids: Int[np.ndarray, "N S"]) -> np.ndarray:
    """Return the Hamming distance of each grid to the nearest cached one, as a share [N].

    A picture of the set has 0. The memory is that of one block.
    """
    best = np.ones(len(grids))
    for block in rows.blocks():
        for i, codes in enumerate(grids):
            best[i] = min(best[i], np.mean(block != codes, axis=1).min())
    return best
