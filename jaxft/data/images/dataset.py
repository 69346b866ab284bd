"""From an image file's bytes to pixels of one size, with what determines them as a key."""

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jaxft.core.errors import UserError
from jaxft.data.images.buckets import Size, assign, make_buckets
from jaxft.data.images.png import correct_transparency, without_texts
from jaxft.data.sources.image_records import Bad, Records, name_all

PIXEL_RULE = "cover, lanczos, centre; 2"  # in every key: change it when `decode` or `fit` change
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (bottom, right)
CORNER_SCALE = 1.1  # LlamaGen's, of the picture whose corners are cropped
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")  # MPO and TIFF hold further pictures, no frames
# First bytes of formats that Pillow does not open: (place, bytes, name).
_FOREIGN_FORMATS = (
    (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"), (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "SVG"),
)  # fmt: skip


class Fitted(NamedTuple):
    """Pixels uint8 [h, w, 3] and, each as (height, width), what SDXL is told about them.

    original: the picture's size; crop: (top, left) of the crop in the resized picture;
    target: (h, w).
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    original: Size
    crop: Size
    target: Size


class ImageExample(NamedTuple):
    """One picture to train on; `key` is a hash of everything that determines the pixels.

    `source`: the picture that it was edited from, resized, cropped and mirrored alike.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    caption: str
    time_ids: Float[np.ndarray, "6"]
    key: str
    source: UInt8[np.ndarray, "h w 3"] | None = None


def decode(content: bytes, name: str) -> Image.Image:
    """The upright RGB picture, with alpha over white, and 8 bits a channel.

    Greys of 16 bits are rounded to 8, of colours the higher byte is kept. Upright is what
    Pillow's `exif_transpose` makes of the loaded picture, from EXIF or XMP anywhere in the file.
    Raises UserError naming the picture where it is corrupt, truncated, animated, no image or
    larger than Pillow's limit against decompression bombs.
    """
    try:
        content = without_texts(content)
        with Image.open(BytesIO(content)) as image:
            _refuse_animated(image, name)
            image.load()
            correct_transparency(image, content)
            return _to_rgb(_upright(image), name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds; each becomes one line
        raise _unreadable(content, name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, LookupError, struct.error):
        return image  # EXIF that is none: Pillow passes over it in JPEG files, but not in PNG


def _refuse_animated(image: Image.Image, name: str) -> None:
    if image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
        raise UserError(f"{name}: the image is animated: expected a still picture")


def _unreadable(content: bytes, name: str, error: Exception) -> UserError:
    if not content:
        return UserError(f"{name}: the image file is empty (0 bytes)")
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: the image is too large: {error}")
    for place, start, known in _FOREIGN_FORMATS:
        if content[place:].startswith(start):
            return UserError(f"{name}: {known} pictures are not read: convert it to PNG or JPEG")
    reason = next(iter(str(error).replace("<_io.BytesIO object", "<").splitlines()), "")
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"starts with {content[:12]!r}"
    return UserError(
        f"{name}: cannot decode the image ({type(error).__name__}: {reason}): "
        "expected a whole PNG, JPEG, WebP or other image file"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{name}: float pixels have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: 32-bit pixels have no known range: save it with 16 bits")
        opaque = values != image.info.get("transparency", -1)
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        image = Image.merge("LA", (grey, Image.fromarray(opaque.astype(np.uint8) * 255)))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def drop_bad(
    records: Records, limit: float = 0.01, threads: int = 4
) -> tuple[Records, tuple[Bad, ...]]:
    """The pictures that decode, with their sizes, and the others; each is decoded once.

    Above a fraction of `limit`, raises UserError that counts and names all bad ones.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda index: _size_or_error(records, index), range(len(records))))
    bad = tuple(Bad(records.name(i), one) for i, one in enumerate(found) if isinstance(one, str))
    if len(bad) > limit * len(records):
        raise UserError(
            f"{len(bad)} of {len(records)} images of {records.spec!r} are bad, more than "
            f"{limit:.0%}: repair or remove them: {name_all(bad)}"
        )
    good = [i for i, one in enumerate(found) if not isinstance(one, str)]
    sizes = np.asarray([found[i] for i in good], np.int32).reshape(-1, 2)
    if not bad:
        return replace(records, sizes=sizes), ()
    print(f"left out {len(bad)} bad images of {records.spec}, first: {bad[0].error}", flush=True)
    return replace(records.keep(good), sizes=sizes), bad


def _size_or_error(records: Records, index: int) -> Size | str:
    """(height, width) of the upright picture, or why it is bad."""
    try:
        record = records[index]
        picture = decode(record.content, record.name)
        if record.source is not None:
            _check_pair(picture, decode(record.source, f"source of {record.name}"), record.name)
    except UserError as error:
        return str(error)
    return picture.height, picture.width


def _check_pair(picture: Image.Image, source: Image.Image, name: str) -> None:
    """Both have one shape up to a pixel, or cropping would shift one against the other."""
    (w, h), (source_w, source_h) = picture.size, source.size
    if abs(w * source_h - h * source_w) > max(w, h, source_w, source_h):
        raise UserError(
            f"{name}: the image has {w}x{h} pixels and its source {source_w}x{source_h}: "
            "expected one aspect ratio, so that both are cropped alike"
        )


def fit(image: Image.Image, size: Size, flip: bool = False, crop: int = 0) -> Fitted:
    """Resize to cover `size` (h, w) with an antialiased Lanczos filter and crop the centre.

    `crop` n > 0 is CORNERS[n - 1] of the centre of a picture CORNER_SCALE larger, as in LlamaGen's
    ten crops. The mirror comes before the crop, as in diffusers, so that its place stays true.
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
    # Resizing the crop's box alone gives the same pixels, and a panorama never grows large.
    y, x = height / rows, width / columns
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS, box=box))
    return Fitted(pixels, (height, width), (top, left), size)


def time_ids(fitted: Fitted) -> Float[np.ndarray, "6"]:
    """SDXL's conditioning: original height, width, crop top, left, target height, width."""
    return np.asarray((*fitted.original, *fitted.crop, *fitted.target), np.float32)


@dataclass(frozen=True)
class _Captions:
    """The captions of an ImageSet by example, read without the pictures."""

    records: Records
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> str:
        return self.records.caption(index % len(self.records))


class ImageSet:
    """Pictures of a set fitted to their bucket's size; indexing is safe in threads.

    With `use_buckets` every picture's bucket has its shape; without, all are cropped to the square
    `resolution`. With `crops` example k * n + i of n pictures is another crop of example i
    (`fit`); with `flips` the second half of all examples is the first, mirrored.
    captions[i]: the caption alone. bucket_of int32 [examples]: index into `sizes`, the (h, w)
    of the buckets in use. originals int32 [images, 2]: height and width of every upright picture.
    Pictures that do not decode, or in formats that nothing reads, are left out, into `bad`.
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
        self.records, bad = drop_bad(records)
        records = self.records
        assert records.sizes is not None
        self.bad, self.originals = records.left_out + bad, records.sizes
        self._crops, self._copies = crops, crops * (2 if flips else 1)
        buckets = make_buckets(resolution, multiple)
        self.sizes: tuple[Size, ...] = ((resolution, resolution),)
        places = np.zeros(len(records), np.int32)
        if use_buckets:
            chosen = [assign((int(h), int(w)), buckets) for h, w in self.originals]
            used, places = np.unique(chosen, return_inverse=True)
            self.sizes = tuple(buckets[bucket] for bucket in used)
        self.bucket_of = np.tile(places.astype(np.int32), self._copies)
        self.captions = _Captions(records, len(self))

    def __len__(self) -> int:
        return self._copies * len(self.records)

    def __getitem__(self, index: int) -> ImageExample:
        name, caption, content, source = self.records[index % len(self.records)]
        size, flip = self._size(index), self._flipped(index)
        crop = self._crop(index)
        fitted = fit(decode(content, name), size, flip, crop)
        example = ImageExample(fitted.pixels, caption, time_ids(fitted), self._key(index, content))
        if source is None:
            return example
        before = fit(decode(source, f"source of {name}"), size, flip, crop)
        return example._replace(source=before.pixels)

    def __repr__(self) -> str:
        return f"ImageSet({self.records!r}, {len(self)} examples)"

    def key(self, index: int) -> str:
        """The example's key, from its bytes without decoding them."""
        return self._key(index, self.records[index % len(self.records)].content)

    @cached_property
    def report(self) -> dict[str, int]:
        """Counts of images, of those cropped, of those smaller than their target, and by bucket.

        bad: pictures that do not decode; not_read, where there are any: those in other formats.
        """
        targets = np.asarray(self.sizes)[self.bucket_of[: len(self.records)]]
        scale = (targets / self.originals).max(axis=1)
        covered = np.maximum(targets, np.round(self.originals * scale[:, None]))
        counts = {
            "images": len(self.records),
            "bad": len(self.bad) - len(self.records.left_out),
            "cropped": int((covered > targets).any(axis=1).sum()),
            "smaller_than_target": int((self.originals < targets).any(axis=1).sum()),
        }
        if self.records.left_out:
            counts["not_read"] = len(self.records.left_out)
        per_bucket = np.bincount(self.bucket_of, minlength=len(self.sizes)) // self._copies
        names = [f"bucket_{h}x{w}" for h, w in self.sizes]
        return counts | dict(zip(names, per_bucket.tolist(), strict=True))

    def _size(self, index: int) -> Size:
        return self.sizes[self.bucket_of[index]]

    def _flipped(self, index: int) -> bool:
        return index >= self._crops * len(self.records)

    def _crop(self, index: int) -> int:
        return index // len(self.records) % self._crops

    def _key(self, index: int, content: bytes) -> str:
        rule = f"|{self._size(index)}|{PIXEL_RULE}|{self._flipped(index)}"
        if crop := self._crop(index):
            rule += f"|corner {crop} of {CORNER_SCALE}"
        return hashlib.sha256(hashlib.sha256(content).digest() + rule.encode()).hexdigest()


def collate(
    examples: Sequence[ImageExample], *, batch_rows: int, size: Size | None = None
) -> dict[str, np.ndarray]:
    """pixels uint8 [B, h, w, 3], time_ids float32 [B, 6] and weights float32 [B].

    Rows past `examples` are padding with weight 0. Without `size` it is the first example's.
    Raises ValueError where sizes are mixed, or where nothing tells the size.
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
