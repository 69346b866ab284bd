"""Training pictures of an autoencoder, mirrored ones too."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxft.data.images.buckets import Size
from jaxft.data.images.dataset import ImageSet, collate
from jaxft.data.loader import train_loader
from jaxft.data.sources.images.records import Bad
from jaxft.data.sources.schemes import open_images
from jaxft.tasks import Planned
from jaxft.tasks.autoencoder.opened import OpenedAutoencoder


class ImageRows:
    """A picture set as pixels, read in every step. Implements `jaxft.tasks.Rows`."""

    def __init__(self, opened: OpenedAutoencoder, spec: str, training: bool):
        self.cfg, self.name = opened.cfg, spec
        records, side = open_images(spec, captions=False), opened.options.resolution
        self.images = ImageSet(records, side, opened.codec.cfg.factor, False, training)

    @property
    def bad(self) -> tuple[Bad, ...]:
        return self.images.bad

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.images,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=collate,
            rows=rows,
        )

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        yield _shapes(rows.stop - rows.start, self.images.sizes[0])

    def report(self) -> dict[str, Any]:
        return self.images.report

    def describe(self) -> str:
        return f"{self.name}: {len(self.images.records)} images, mirrored too"


def planned(opened: OpenedAutoencoder) -> Planned:
    """Return square pictures of `resolution`."""
    side = opened.options.resolution
    return Planned(_shapes(opened.cfg.batch_size, (side, side)))


def _shapes(count: int, size: Size) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` pictures."""
    batch = collate([], batch_rows=count, size=size)
    batch["sample_ids"] = np.zeros(count, np.int32)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
