"""Every LoRA option on every kind of projection, in every family."""

from functools import partial
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.params import bind, describe
from jaxft.core.sharding import make_mesh
from jaxft.core.step import sample_keys
from jaxft.nn import conv, linear, lora
from tests import whole
from tests.tiny_autoencoders import make_vqmodel
from tests.tiny_diffusion import make_config as diffusion_config
from tests.tiny_diffusion import make_pictures as captioned
from tests.tiny_image_tokens import CODES, make_pictures
from tests.tiny_image_tokens import make_config as image_config
from tests.tiny_janus import SIZE, make_janus_model
from tests.tiny_pipelines import make_pipeline

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LORA = {
    "mesh.data": 8,
    "mesh.fsdp": 1,
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "lora.dropout": 0.5,
    "trainable": "",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def opened(make_folder, make_config, pictures, tmp_path_factory):
    """`opened(family, lora.targets)`: the task of a tiny folder; nothing of it is loaded."""
    work = tmp_path_factory.mktemp("families")
    cache = str(work / "cache")

    def config(name, targets):
        changes = {**LORA, "lora.targets": targets}
        if name.startswith("llm"):
            return make_config(make_folder(), {**changes, "pack": name == "llm packed"})
        if name == "image tokens":
            graft = make_vqmodel(work / "vq", CODES)
            changes |= {"graft": str(graft), "loss.text_weight": 0.5}
            return image_config(make_folder(), pictures, cache, changes)
        if name == "janus":
            folder = make_janus_model(work / "janus")
            changes |= {"resolution": SIZE, "max_caption_tokens": 64}
            return image_config(folder, pictures, cache, changes)
        make_pipeline(work / name, name).save_pretrained(work / name / "folder")
        shown = captioned(work / name / "pictures")
        return diffusion_config(work / name / "folder", shown, {**changes, "caption_dropout": 0.1})

    return lambda name, targets: whole.open_run(config(name, targets))


def a_batch(task):
    """Shapes of a batch; the pictures' codes and moments need no encoder here."""
    if task.cfg.task == "image_tokens":
        rows = task.train
        row = {
            "codes": np.zeros((2, task.opened.layout.count), np.int32),
            "prompt": np.zeros((2, rows.width), np.int32),
            "length": np.full(2, 3, np.int32),
            "weights": np.ones(2, np.float32),
        }
        return {**row, "sample_ids": np.arange(2, dtype=np.int32)}
    return task.shapes(slice(0, 8))[0]


@pytest.fixture
def drawn(monkeypatch):
    """The streams of the adapters whose dropout is drawn, and rows beside keys."""
    streams = set()

    def record(x, keys, adapter):
        assert len(x) == len(keys), "a mask belongs to a row"
        streams.add(adapter.stream)
        return plain(x, keys, adapter)

    plain = linear.dropout
    monkeypatch.setattr(linear, "dropout", record)
    monkeypatch.setattr(conv, "dropout", record)
    return streams


@pytest.mark.parametrize(
    ("family", "targets", "kinds"),
    [
        ("llm", ".*", ["layers.self_attn.q_proj", "layers.mlp.down_proj", "lm_head"]),
        ("llm packed", ".*", ["layers.self_attn.o_proj", "lm_head"]),
        ("image tokens", ".*", ["layers.mlp.up_proj", "lm_head"]),
        ("janus", ".*", ["generation_aligner.fc1", "generation_aligner.hidden_layers.0"]),
        ("janus", "generation_head.*", ["generation_head.proj_out", "generation_head.vision_head"]),
        ("sd", r"(unet|text_encoder).*", ["unet.conv_in", "unet.time_embedding.linear_1"]),
        ("sdxl", r"(unet|text_encoder).*", ["unet.add_embedding.linear_1", "unet.conv_out"]),
    ],
)
def test_case_llm_08_dropout_acts_on_every_projection(opened, drawn, family, targets, kinds):
    """In training every adapter draws its mask; an evaluation draws none."""
    task = opened(family, targets)
    paths = lora.adapted(describe(task.opened.template))
    assert set(kinds) <= set(paths)
    batch = a_batch(task)
    ids = jnp.asarray(batch["sample_ids"])

    def loss(model, batch):
        return task.objective.loss(model, batch, sample_keys(0, 0, ids), jnp.int32(0))[0]

    jax.eval_shape(loss, task.opened.template, batch)
    missing = [path for path in paths if crc32(path.encode()) not in drawn]
    assert not missing
    drawn.clear()
    params = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves_of(task).items()}
    score = getattr(type(task.preview), "_score", None)
    if family.startswith("llm"):
        jax.eval_shape(score, task.preview, params, batch, jnp.zeros(1, jnp.int32))
    elif task.cfg.task == "image_tokens":
        jax.eval_shape(score, task.preview, params, batch)
    assert not drawn


def leaves_of(task):
    return describe(task.opened.template)


def test_case_llm_08_the_heads_masks_depend_on_the_row_alone(opened):
    """Whole, in two halves as micro-batches are, and spread over a mesh: the same loss."""
    task = opened("llm", "lm_head")
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
        for path, leaf in leaves_of(task).items()
    }
    batch = a_batch(task)
    names = ("tokens", "targets", "weights", "segment_ids", "positions", "sample_ids")
    batch = {name: jnp.asarray(batch[name]) for name in names}

    @partial(jax.jit, compiler_options=QUICK)
    def loss(params, batch):
        keys = sample_keys(0, 0, batch["sample_ids"])
        return task.objective.loss(bind(task.opened.template, params), batch, keys, jnp.int32(0))[
            0
        ][0]

    whole = loss(params, batch)
    halves = [loss(params, {k: x[part] for k, x in batch.items()}) for part in np.s_[::2, 1::2]]
    np.testing.assert_allclose(sum(halves), whole, rtol=1e-5)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        np.testing.assert_allclose(loss(params, batch), whole, rtol=1e-5)
    other = {**batch, "sample_ids": batch["sample_ids"] + 1000}
    assert abs(loss(params, other) - whole) > 1e-4 * abs(whole)
