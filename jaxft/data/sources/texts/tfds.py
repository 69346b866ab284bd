"""Splits of TFDS datasets of texts."""

import re
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.texts import TextRecords

_TFDS_SPEC = re.compile(r"(?P<name>[^:@]+(:\d+\.\d+\.\d+)?)(:(?P<split>[^@]+))?(@(?P<folder>.+))?")


class TfdsRecords:
    """Records of a TFDS split, read without TensorFlow. Texts are decoded, class labels named."""

    def __init__(self, spec: str, source: Any, features: Any, text_keys: set[str]):
        self._spec, self._source = spec, source
        self._text_keys = text_keys
        self._class_names = {k: f.int2str for k, f in features.items() if hasattr(f, "int2str")}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: self._readable(index, key, v) for key, v in self._source[index].items()}

    def _readable(self, index: int, key: str, value: Any) -> Any:
        if key in self._class_names:
            return self._class_names[key](int(value))
        if key in self._text_keys and isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.where(index)}: field {key!r} is invalid UTF-8 at byte {error.start}"
                ) from None
        return value

    def __repr__(self) -> str:
        return f"TfdsRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return f"{self._spec} record {index}"


def tfds_arguments(spec: str, rest: str) -> tuple[Any, str, dict[str, Any]]:
    """Return the TFDS package, a dataset's name, and the other arguments of `tfds.data_source`."""
    match = _TFDS_SPEC.fullmatch(rest)
    if match is None:
        raise UserError(f"cannot read {spec!r}: expected tfds:NAME[:SPLIT][@DATA_DIR]")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f'{spec!r} needs tensorflow-datasets: pip install "jaxft[data]"') from None
    where = {"split": match["split"] or "train", "data_dir": match["folder"]}
    return tfds, match["name"], where


def open_tfds_texts(spec: str, rest: str) -> TextRecords:
    """Open a split of a TFDS dataset of texts."""
    tfds, name, where = tfds_arguments(spec, rest)
    try:
        source: Any = tfds.data_source(name, **where)
    except Exception as error:  # TFDS raises many kinds; each becomes one line
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"cannot open {spec!r}: {type(error).__name__}: {reason}; expected an installed or "
            "prepared TFDS dataset in array_record or parquet format, and one of its splits"
        ) from error
    if not len(source):
        raise UserError(f"{spec!r} is empty: choose another split")
    features = source.dataset_info.features
    text_keys = {key for key, f in features.items() if isinstance(f, tfds.features.Text)}
    return TfdsRecords(spec, source, features, text_keys)
