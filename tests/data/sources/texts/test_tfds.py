"""TFDS splits of texts, prepared without a network."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records


def one_line_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepare_tfds(folder: Path) -> None:
    """Prepare a tiny TFDS dataset in a child process: registering a builder is global state."""
    code = f"""
import pathlib
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    pkg_dir_path = pathlib.Path({str(folder)!r})
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        label = tfds.features.ClassLabel(names=["bad", "good"])
        features = {{"text": tfds.features.Text(), "label": label}}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))
    def _split_generators(self, _):
        return {{"train": self._generate_examples(6), "test": self._generate_examples(2)}}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {{"text": f"r\\u00f6w {{i}}", "label": i % 2}}
Tiny(data_dir={str(folder)!r}, file_format="array_record").download_and_prepare()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_tfds_decodes_text_and_names_labels(tmp_path):
    prepare_tfds(tmp_path)
    records = open_records(f"tfds:tiny@{tmp_path}")
    rows = sorted((records[i] for i in range(len(records))), key=lambda row: row["text"])
    assert rows == [{"text": f"röw {i}", "label": ("bad", "good")[i % 2]} for i in range(6)]
    assert records.where(4) == f"tfds:tiny@{tmp_path} record 4"
    assert len(open_records(f"tfds:tiny:test@{tmp_path}")) == 2
    assert len(open_records(f"tfds:tiny:1.0.0:train[:50%]@{tmp_path}")) == 3
    assert "'none'" in one_line_error(lambda: open_records(f"tfds:tiny:none@{tmp_path}"))
    assert "nosuchset" in one_line_error(lambda: open_records(f"tfds:nosuchset@{tmp_path}"))
    assert "tensorflow" not in sys.modules
