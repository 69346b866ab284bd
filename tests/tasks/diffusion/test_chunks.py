"""Captions in chunks of 75 tokens, against kohya's ids and transformers' CLIP, chunk by chunk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.tasks import Request
from tests import whole as runs
from tests.tiny_diffusion import make_config
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3

CAPTIONS = ["", "a red fish", *("b" * n for n in (74, 75, 76, 149, 150, 151, 400))]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


@pytest.fixture(scope="module")
def folders(plain, tmp_path_factory):
    """SDXL's second tokenizer pads with "!", as the published one."""
    work = tmp_path_factory.mktemp("pipeline")
    pipe = make_pipeline(work, "sdxl")
    pipe.save_pretrained(work / "folder")
    file = work / "folder" / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "!"}))
    return {"sd": plain, "sdxl": work / "folder"}


def kohya_ids(tokenizer, caption, count):
    """`get_input_ids` of sd-scripts' library/train_util.py, [count, 77]."""
    most, (begin, end, pad) = count * 75 + 2, (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    ids = tokenizer(caption, padding="max_length", truncation=True, max_length=most).input_ids
    chunks = []
    for i in range(1, most - 77 + 2, 75):
        chunk = [begin, *ids[i : i + 75], ids[-1]]
        if pad != end:  # "v2 or SDXL": <BOS> .... <EOS> <PAD> ... as a whole
            if chunk[-2] not in (end, pad):
                chunk[-1] = end
            if chunk[1] == pad:
                chunk[1] = end
        chunks.append(chunk)
    return torch.tensor(chunks)


def torch_texts(pipe, captions, count, skip):
    """Context [B, 77 n, D] and pooled [B, P], each chunk encoded alone."""
    names = [n for n in ("text_encoder", "text_encoder_2") if n in pipe.components]
    contexts, pooled = [], []
    for caption in captions:
        states, first = [], None
        for name in names:
            encoder = getattr(pipe, name)
            inner = getattr(encoder, "text_model", encoder)
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            made = [
                encoder(one[None], output_hidden_states=True)
                for one in kohya_ids(tokenizer, caption, count)
            ]
            if len(names) == 1:
                own = [inner.final_layer_norm(one.hidden_states[-1 - skip]) for one in made]
            else:
                own = [one.hidden_states[-2 - skip] for one in made]
                first = made[0][0]
            states.append(torch.cat(own, dim=1))
        contexts.append(torch.cat(states, dim=-1))
        pooled.append(first)
    return torch.cat(contexts).numpy(), None if first is None else torch.cat(pooled).numpy()


def opened_run(folder, pictures, **changes):
    run = runs.open_run(make_config(folder, pictures, changes))
    with jax.set_mesh(run.mesh):
        return run, runs.load_params(run)


@pytest.mark.parametrize(
    ("family", "count", "skip"), [("sd", 2, 0), ("sd", 3, 1), ("sdxl", 2, 1), ("sdxl", 3, 0)]
)
def test_each_chunk_is_encoded_alone(folders, pictures, family, count, skip):
    changes = {"caption_chunks": count, "clip_skip": skip}
    run, params = opened_run(folders[family], pictures, **changes)
    pipe = DiffusionPipeline.from_pretrained(folders[family])
    ids = np.stack([run.opened.captions(caption) for caption in CAPTIONS])
    assert ids.shape[1:] == run.opened.ids_shape == (1 + (family == "sdxl"), 77 * count)
    for place, tokenizer in enumerate((pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        for row, caption in zip(ids, CAPTIONS, strict=True):
            if tokenizer is not None:
                wanted = kohya_ids(tokenizer, caption, count).flatten()
                np.testing.assert_array_equal(row[place], wanted, err_msg=caption)

    @jax.jit
    def encode(params):
        model = bind(run.opened.template, params)
        text = run.objective.text(model, {"ids": jnp.asarray(ids)}, None)
        return text, run.objective.null(model)

    text, null = encode(params)
    with torch.no_grad():
        context, pooled = torch_texts(pipe, CAPTIONS, count, skip)
        whole, _ = torch_texts(pipe, [""], count, 0)
    np.testing.assert_allclose(text.context, context, atol=1e-5)
    assert null.context.shape == (1, 77 * count, context.shape[-1])
    np.testing.assert_allclose(null.context, 0 * whole if family == "sdxl" else whole, atol=1e-5)
    if family == "sdxl":
        np.testing.assert_allclose(text.pooled, pooled, atol=1e-5)


def test_steps_caches_and_samples_have_the_chunks(folders, pictures, tmp_path):
    changes = {"caption_chunks": 2, "cache": tmp_path, "caption_dropout": 0.5}
    run, params = opened_run(folders["sdxl"], pictures, **changes)
    run.encode(params)
    batch = next(run.train.batches(0, slice(0, 8)))
    pipe = DiffusionPipeline.from_pretrained(folders["sdxl"])
    captions = [run.train.caption(int(i)) for i in batch["sample_ids"]]
    with torch.no_grad():
        context, pooled = torch_texts(pipe, captions, 2, 0)
    np.testing.assert_allclose(batch["context"], context, atol=1e-5)
    np.testing.assert_allclose(batch["pooled"], pooled, atol=1e-5)
    (shapes,) = {run.opened.text_shapes().context.shape, (1, *batch["context"].shape[1:])}
    assert shapes == (1, 154, 40) and run.train.empty_text.context.shape == shapes
    # A prompt that differs in its second chunk alone is another picture.
    prompts = ["b" * 100, "b" * 99 + "a"]
    preview = run.preview
    made = [
        look.pictures["made"].astype(int)
        for prompt in prompts
        for look in preview.complete(params, [prompt], Request(guidance=9.0))
    ]
    assert np.abs(made[0] - made[1]).max() > 0


def test_dropout_of_an_encoders_adapters_has_the_keys_of_the_rows(plain, pictures):
    changes = {"lora.rank": 2, "lora.dropout": 0.5, "lora.targets": r"text_encoder\..*q_proj"}
    run, params = opened_run(plain, pictures, caption_chunks=2, **changes)
    # The second factors start at zero, where dropout has no effect.
    params = {path: x + 0.3 * (".lora_b" in path) for path, x in params.items()}
    ids = jnp.asarray(np.stack([run.opened.captions("b" * 100)] * 2))

    @jax.jit
    def encode(params, keys):
        model = bind(run.opened.template, params)
        return run.objective.text(model, {"ids": ids}, keys).context

    keys = jax.vmap(jax.random.key)(np.arange(2))
    first, second = encode(params, keys)
    assert np.abs(first - second).max() > 1e-3, "rows have dropout of their own"
    assert np.array_equal(encode(params, keys[:1][np.zeros(2, int)])[1], first)
    assert first.shape == (154, 16) and np.isfinite(first).all()


def test_what_is_cut_is_told_by_the_new_length(plain, pictures):
    run, _ = opened_run(plain, pictures, caption_chunks=2)
    captions = run.opened.captions
    assert captions.length == 152 and captions.too_long(["b" * 150, "b" * 151, "a"]) == 1
    run.train.cut = 3
    assert "3 captions longer than 152 tokens, cut" in run.train.describe()


@pytest.mark.parametrize(
    ("family", "count", "words"),
    [
        ("sd", 0, "caption_chunks=0 must be at least 1"),
        ("sd3", 2, "caption_chunks=2 is for CLIP as the only .* this is Stable Diffusion 3"),
    ],
)
def test_chunks_that_a_model_does_not_read(plain, pictures, tmp_path, family, count, words):
    folder = plain
    if family == "sd3":
        folder = tmp_path / "folder"
        make_sd3(tmp_path, t5=False).save_pretrained(folder)
    with pytest.raises(UserError, match=words) as error:
        runs.open_run(make_config(folder, pictures, {"caption_chunks": count}))
    assert "\n" not in str(error.value)
