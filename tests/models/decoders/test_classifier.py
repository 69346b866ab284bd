"""Sources of sequence classifiers: which tensors there are, and which labels."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.core.errors import UserError
from jaxft.models.decoders.classifier import class_name, open_classifier, stated_labels

NAMES = ("calm", "loud", "wet")


def changed(folder, place, config=None, rename=None):
    """A copy of a model's folder with other keys in config.json, and renamed tensors."""
    shutil.copytree(folder, place)
    stated = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**stated, **(config or {})}))
    tensors = load_file(place / "model.safetensors")
    named = {(rename or str)(key): x for key, x in tensors.items()}
    save_file({key: x for key, x in named.items() if key}, place / "model.safetensors")
    return str(place)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_loses_its_head_and_gets_scores(make_folder, tied):
    source = open_classifier(str(make_folder(tied=tied)), labels=NAMES, seed=3)
    keys = list(source.tensors.keys())
    assert keys[-1] == "score.weight" and "lm_head.weight" not in keys
    assert source.tensors.info("score.weight") == ((3, 32), np.dtype(np.float32))
    head = source.tensors.read("score.weight")
    assert 0.1 < head.std() < 0.3, "initializer_range is 0.2"
    np.testing.assert_array_equal(head, source.tensors.read("score.weight"))
    assert source.config["tie_word_embeddings"] is tied
    assert class_name(source.config) == "LlamaForSequenceClassification"


def test_a_tied_model_whose_file_has_its_table_as_a_head(make_folder, tmp_path):
    rename = {"model.embed_tokens.weight": "lm_head.weight"}
    place = changed(make_folder(tied=True), tmp_path / "m", rename=lambda k: rename.get(k, k))
    keys = set(open_classifier(place, labels=NAMES).tensors.keys())
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys


def test_a_base_model_without_a_head_and_prefix(make_folder, tmp_path):
    place = changed(
        make_folder(),
        tmp_path / "m",
        {"architectures": ["LlamaModel"]},
        lambda key: key.removeprefix("model.").replace("lm_head.weight", ""),
    )
    source = open_classifier(place, labels=NAMES)
    assert "model.norm.weight" in source.tensors.keys()  # noqa: SIM118
    assert class_name(source.config) == "LlamaForSequenceClassification"


def test_labels_of_a_config():
    assert stated_labels({}) == ("LABEL_0", "LABEL_1"), "transformers' default"
    assert stated_labels({"id2label": {"1": "b", "0": "a", "10": "c"}}) == ("a", "b", "c")


def test_a_classifier_of_another_task_is_refused(make_folder, tmp_path):
    place = changed(
        make_folder(), tmp_path / "m", {"architectures": ["LlamaForTokenClassification"]}
    )
    with pytest.raises(UserError, match="is not a causal language model"):
        open_classifier(place, labels=NAMES)
