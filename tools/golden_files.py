"""Files of the golden runs' material: JSON and safetensors, written without a library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write fp32 arrays as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a readable JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
