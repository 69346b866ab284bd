"""Sets of pictures: fitted pixels, with a key of everything that determines them."""

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.cache import ArrayCache, Arrays
from jaxft.data.images.buckets import Size, assign, make_buckets
from jaxft.data.images.decode import decode
from jaxft.data.images.headers import header_size
from jaxft.data.sources.images.records import Bad, Records, name_all

PIXEL_RULE = "cover, lanczos, centre; 2"  # in every key: change it when `decode` or `fit` change
BAD_LIMIT = 0.01  # share of a set that may be bad
UNDECODABLE = "bad"  # name of the array that a cache has for a picture that does not decode
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (bottom, right)
CORNER_SCALE = 1.1  # of a picture before its corners are cropped, as in LlamaGen


class Fitted(NamedTuple):
    """Pixels uint8 [h, w, 3] and the size conditioning of SDXL.

    original: (height, width) of the picture. crop: (top, left) of the crop in the resized picture.
    target: (h, w).
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    original: Size
    crop: Size
    target: Size


class ImageExample(NamedTuple):
    """One picture to train on. `key` is a hash of everything that determines the pixels.

    source: the picture before the edit, resized, cropped and mirrored in the same way.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    caption: str
    time_ids: Float[np.ndarray, "6"]
    key: str
    source: UInt8[np.ndarray, "h w 3"] | None = None


def drop_bad(
    records: Records, limit: float = BAD_LIMIT, threads: int = 4
) -> tuple[Records, tuple[Bad, ...]]:
    """Return the pictures with sound headers, with sizes and digests, and the bad ones.

    Each file is read once. A picture is decoded here only if its header is in doubt. Raises
    UserError that counts and names all bad pictures if they are more than the fraction `limit`.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda index: _head_or_error(records, index), range(len(records))))
    bad = tuple(Bad(records.name(i), one) for i, one in enumerate(found) if isinstance(one, str))
    _refuse_many(bad, len(records), records.spec, limit)
    good = [i for i, one in enumerate(found) if not isinstance(one, str)]
    sizes = np.asarray([found[i][0] for i in good], np.int32).reshape(-1, 2)
    digests = tuple(found[i][1] for i in good)
    if bad:
        first = bad[0].error
        print(f"left out {len(bad)} bad images of {records.spec}, first: {first}", flush=True)
        records = records.keep(good)
    return replace(records, sizes=sizes, digests=digests), bad


def _refuse_many(bad: Sequence[Bad], total: int, spec: str, limit: float) -> None:
    if len(bad) > limit * total:
        raise UserError(
            f"{len(bad)} of {total} images of {spec!r} are bad, more than "
            f"{limit:.0%}: repair or remove them: {name_all(bad)}",
            bad=[one._asdict() for one in bad],
        )


def _head_or_error(records: Records, index: int) -> tuple[Size, bytes] | str:
    """Return the upright picture's (height, width) and its file's digest, or an error."""
    try:
        name, _, content, source = records[index]
        size = _size(content, name)
        if source is not None:
            _check_pair(size, _size(source, f"source of {name}"), name, "source")
        if records.masks is not None and not records.alpha:
            mask = _size(records.masks.content(index), records.masks.name(index))
            _check_pair(size, mask, name, "mask")
    except UserError as error:
        return str(error)
    return size, hashlib.sha256(content).digest()


def _size(content: bytes, name: str) -> Size:
    """Return the size in the header, or that of the decoded picture if the header is in doubt.

    Raises UserError if it does not decode.
    """
    if (size := header_size(content)) is not None:
        return size
    picture = decode(content, name)
    return picture.height, picture.width


def _check_pair(size: Size, other: Size, name: str, kind: str) -> None:
    """Raise UserError unless both have the same shape up to a pixel.

    Otherwise cropping would shift one against the other. kind: "source" or "mask".
    """
    (h, w), (other_h, other_w) = size, other
    if abs(w * other_h - h * other_w) > max(w, h, other_w, other_h):
        raise UserError(
            f"{name}: the image has {w}x{h} pixels and its {kind} {other_w}x{other_h}: "
            "expected one aspect ratio, so that both are cropped alike"
        )


def fit(image: Image.Image, size: Size, flip: bool = False, crop: int = 0) -> Fitted:
    """Resize to cover `size` (h, w) with an antialiased Lanczos filter and crop the centre.

    `crop` n > 0 takes CORNERS[n - 1] of the centre of a picture CORNER_SCALE larger, as in
    LlamaGen's ten crops. The picture is mirrored before the crop, as in diffusers, so that
    `Fitted.crop` is the place in the mirrored picture.
    """
    (h, w), (height, width) = size, (image.height, image.width)
    tall, wide = (round(CORNER_SCALE * h), round(CORNER_SCALE * w)) if crop else size
    scale = max(tall / height, wide / width)
    rows, columns = max(tall, round(height * scale)), max(wide, round(width * scale))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    if crop:
        bottom, right = CORNERS[crop - 1]
        top, left = top + bottom * (tall - h), left + right * (wide - w)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Resizing the box of the crop alone gives the same pixels, and needs no large panorama.
    y, x = height / rows, width / columns
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS, box=box))
    return Fitted(pixels, (height, width), (top, left), size)


def time_ids(fitted: Fitted) -> Float[np.ndarray, "6"]:
    """Return SDXL's conditioning: original height, width, crop top, left, target height, width."""
    return np.asarray((*fitted.original, *fitted.crop, *fitted.target), np.float32)


class ImageSet:
    """Pictures of a set, each fitted to its bucket's size. Indexing is safe in threads.

    With `use_buckets` each picture has the bucket nearest to its shape. Without, all are cropped
    to the square `resolution`. With `crops`, example k * n + i of n pictures is another crop of
    example i (`fit`). With `flips`, the second half of all examples is the first half, mirrored.

    bucket_of int32 [examples]: index into `sizes`, the (h, w) of the buckets in use.
    originals int32 [images, 2]: height and width of every upright picture.
    kept: a cache of the pixels of some examples.
    bad: pictures in formats that are not read, with damaged headers, or that do not decode. The
    last are found at their first use, and another picture of the bucket then takes their place.
    """

    def __init__(
        self,
        records: Records,
        resolution: int,
        multiple: int,
        use_buckets: bool,
        flips: bool = False,
        crops: int = 1,
    ):
        self.records, dropped = drop_bad(records)
        records = self.records
        assert records.sizes is not None
        self._dropped, self.originals = records.left_out + dropped, records.sizes
        self._failed: dict[int, Bad] = {}
        self._lock = threading.Lock()
        self.kept: ArrayCache | None = None
        self._crops, self._copies = crops, crops * (2 if flips else 1)
        buckets = make_buckets(resolution, multiple)
        self.sizes: tuple[Size, ...] = ((resolution, resolution),)
        places = np.zeros(len(records), np.int32)
        if use_buckets:
            chosen = [assign((int(h), int(w)), buckets) for h, w in self.originals]
            used, places = np.unique(chosen, return_inverse=True)
            self.sizes = tuple(buckets[bucket] for bucket in used)
        self.bucket_of = np.tile(places.astype(np.int32), self._copies)

    def __len__(self) -> int:
        return self._copies * len(self.records)

    def __getitem__(self, index: int) -> ImageExample:
        """Return the example. A picture that does not decode is replaced by another one (`place`).

        Raises UserError if more than BAD_LIMIT of all pictures are bad.
        """
        while True:
            place = self.place(index)
            [found] = self.attempts([place])
            if isinstance(found, ImageExample):
                return found
            self.leave_out({place: found})

    def __repr__(self) -> str:
        return f"ImageSet({self.records!r}, {len(self)} examples)"

    @property
    def bad(self) -> tuple[Bad, ...]:
        return self._dropped + tuple(self._failed[record] for record in sorted(self._failed))

    def attempts(self, indices: Iterable[int]) -> list[ImageExample | Bad]:
        """Return the examples, with a Bad for each picture that does not decode.

        A picture is decoded once for all copies that follow each other. It is not decoded if `kept`
        has the pixels.
        """
        made: list[ImageExample | Bad] = []
        for record, copies in groupby(indices, lambda index: index % len(self.records)):
            rest = []
            for index in copies:
                key = self.key(index)
                if self.kept is not None and key in self.kept:
                    made.append(self._from_arrays(record, key, self.kept.get(key)))
                else:
                    rest.append(index)
            made += self._decoded(record, rest) if rest else []
        return made

    def place(self, index: int) -> int:
        """Return the index of the example that is used for `index`, most often itself.

        A picture that did not decode is replaced by the next one of its bucket. Raises UserError
        if no picture of the bucket decoded.
        """
        record = index % len(self.records)
        if record not in self._failed:
            return index
        same = np.flatnonzero(self.bucket_of[: len(self.records)] == self.bucket_of[record])
        after = np.roll(same, -int(np.searchsorted(same, record)))
        good = next((int(one) for one in after if int(one) not in self._failed), None)
        if good is None:
            raise UserError(f"{self._failed[record].error}; no other has its size: remove it")
        return index - record + good

    def leave_out(self, found: Mapping[int, Bad]) -> None:
        """Record pictures that do not decode, by the index of an example, and print a line.

        Raises UserError if more than BAD_LIMIT of all pictures are bad.
        """
        with self._lock:
            new = {index % len(self.records): bad for index, bad in found.items()}
            new = {record: bad for record, bad in new.items() if record not in self._failed}
            self._failed = {**self._failed, **new}
        if new:
            bad = self.bad[len(self.records.left_out) :]
            total = len(self.records) + len(bad) - len(self._failed)
            _refuse_many(bad, total, self.records.spec, BAD_LIMIT)
            first = next(iter(new.values())).error
            print(
                f"replaced {len(new)} bad images of {self.records.spec} by others of their size,"
                f" first: {first}",
                flush=True,
            )

    def caption(self, index: int) -> str:
        """Return the example's caption without reading its picture."""
        return self.records.caption(self.place(index) % len(self.records))

    def key(self, index: int) -> str:
        """Return the example's key, by its file's content when the set was opened."""
        return self._key(index, self.records.digests[index % len(self.records)])

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.key(index) for index in range(len(self)))

    @property
    def report(self) -> dict[str, int]:
        """Return counts of images: all, cropped, smaller than their target, and by bucket.

        bad: damaged pictures. not_read, if there are any: pictures in formats that are not read.
        """
        good = [record for record in range(len(self.records)) if record not in self._failed]
        bucket_of, originals = self.bucket_of[good], self.originals[good]
        targets = np.asarray(self.sizes)[bucket_of]
        scale = (targets / originals).max(axis=1)
        covered = np.maximum(targets, np.round(originals * scale[:, None]))
        counts = {
            "images": len(good),
            "bad": len(self.bad) - len(self.records.left_out),
            "cropped": int((covered > targets).any(axis=1).sum()),
            "smaller_than_target": int((originals < targets).any(axis=1).sum()),
        }
        if self.records.left_out:
            counts["not_read"] = len(self.records.left_out)
        per_bucket = np.bincount(bucket_of, minlength=len(self.sizes))
        names = [f"bucket_{h}x{w}" for h, w in self.sizes]
        return counts | dict(zip(names, per_bucket.tolist(), strict=True))

    def _decoded(self, record: int, indices: Sequence[int]) -> list[ImageExample | Bad]:
        """Return examples of one picture, decoded once."""
        name, caption, content, source = self.records[record]
        try:
            picture = decode(content, name)
            before = None if source is None else decode(source, f"source of {name}")
        except UserError as error:
            return [Bad(name, str(error))] * len(indices)
        digest = hashlib.sha256(content).digest()
        made: list[ImageExample | Bad] = []
        for index in indices:
            how = self.how(index)
            fitted, key = fit(picture, *how), self._key(index, digest)
            edited = None if before is None else fit(before, *how).pixels
            made.append(ImageExample(fitted.pixels, caption, time_ids(fitted), key, edited))
        return made

    def _from_arrays(self, record: int, key: str, arrays: Arrays) -> ImageExample | Bad:
        if UNDECODABLE in arrays:
            return read_bad(self.records.name(record), arrays)
        caption = self.records.caption(record)
        return ImageExample(arrays["pixels"], caption, arrays["time_ids"], key)

    def how(self, index: int) -> tuple[Size, bool, int]:
        """Return the size, mirroring and crop of an example, as `fit` takes them."""
        return self.sizes[self.bucket_of[index]], self._flipped(index), self._crop(index)

    def _flipped(self, index: int) -> bool:
        return index >= self._crops * len(self.records)

    def _crop(self, index: int) -> int:
        return index // len(self.records) % self._crops

    def _key(self, index: int, digest: bytes) -> str:
        size = self.sizes[self.bucket_of[index]]
        rule = f"|{size}|{PIXEL_RULE}|{self._flipped(index)}"
        if crop := self._crop(index):
            rule += f"|corner {crop} of {CORNER_SCALE}"
        return hashlib.sha256(digest + rule.encode()).hexdigest()


def bad_arrays(bad: Bad) -> Arrays:
    """Return the cache's entry of a picture that does not decode: its error without its name."""
    reason = bad.error.removeprefix(f"{bad.name}: ")
    return {UNDECODABLE: np.frombuffer(reason.encode(), np.uint8)}


def read_bad(name: str, arrays: Arrays) -> Bad:
    """Return the Bad of an entry of `bad_arrays`, under its name in this set."""
    return Bad(name, f"{name}: {arrays[UNDECODABLE].tobytes().decode()}")


def collate(
    examples: Sequence[ImageExample], *, batch_rows: int, size: Size | None = None
) -> dict[str, np.ndarray]:
    """Return pixels uint8 [B, h, w, 3], time_ids float32 [B, 6] and weights float32 [B].

    Rows past `examples` are padding with weight 0. `size` is by default that of the first example.
    Raises ValueError for mixed sizes, and for no examples without `size`.
    """
    if size is None and not examples:
        raise ValueError("no example tells the size of an empty batch: pass size=(h, w)")
    h, w = size or examples[0].pixels.shape[:2]
    batch = {
        "pixels": np.zeros((batch_rows, h, w, 3), np.uint8),
        "time_ids": np.zeros((batch_rows, 6), np.float32),
        "weights": np.zeros(batch_rows, np.float32),
    }
    for row, example in enumerate(examples):
        batch["pixels"][row] = example.pixels
        batch["time_ids"][row] = example.time_ids
        batch["weights"][row] = 1
    return batch
