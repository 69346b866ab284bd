"""The certificates of both families of image-token models, and what fails them."""

import shutil
from pathlib import Path

import pytest

from jaxft.tasks.image_tokens.layout import JanusLayout
from jaxft.tasks.image_tokens.opened import open_model
from jaxft.tasks.image_tokens.options import ImageTokenOptions, TokenSample
from tests.tiny_autoencoders import make_vqmodel
from tests.tiny_image_tokens import CODES, SIZE
from tests.tiny_janus import make_janus_model
from tests.verify.test_verify_autoencoder import figures


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return make_janus_model(tmp_path_factory.mktemp("verify") / "janus")


def test_a_janus_passes(janus):
    checks, content = figures(janus, 0)
    assert 0 < checks["gradients, worst relative"]["figure"] < 1e-4
    assert checks["greedy codes, differing"]["note"].startswith("of 72")
    assert checks["tokenizer codes, differing"]["figure"] == 0
    assert content["oracles"].keys() == {"torch", "transformers"}


def test_a_wrong_null_is_seen_in_what_is_drawn_and_in_the_loss(janus, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(janus, tmp_path / "janus"))
    wrong = lambda self, captions, lengths: (captions * 0 + self.pad, lengths)  # noqa: E731
    monkeypatch.setattr(JanusLayout, "without_caption", wrong)
    checks, _ = figures(folder, 1)
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert {"loss, abs", "greedy codes, differing"} <= failed


def test_family_n_passes(make_folder, tmp_path):
    vq = make_vqmodel(tmp_path / "vq", CODES)
    keys = {"resolution": SIZE, "cache": "x", "caption_dropout": 0.1, "graft": str(vq)}
    keys |= {"max_caption_tokens": 60, "sample": TokenSample((), 3.0)}
    text = open_model(str(make_folder()), ImageTokenOptions(**keys), True, 0)
    folder = make_folder(vocab_size=text.layout.vocab_size, initializer_range=0.3)
    (folder / "imagetoken.json").write_text(text.layout.to_json())
    shutil.copytree(vq, folder / "vq")
    checks, content = figures(folder, 0)
    assert checks["greedy codes, differing"]["note"].startswith("of 72")
    assert {"near logits, max abs", "tokenizer codes, differing"} <= checks.keys()
    assert content["tokenizer"]["tokenizer"]["parameters"] > 1000
