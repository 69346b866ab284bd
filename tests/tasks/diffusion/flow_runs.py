"""Runs of flow matching pipelines and the proofs that their tests share."""

import json

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file

from jaxft import export, sample, train
from tests.tiny_diffusion import flags_of

NAME = "diffusion_pytorch_model.safetensors"
LORA = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "optim.lr": 0.05}
CALL = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
PROMPT = "a red fish"


def losses(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def damaged(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(source, data, work, capsys, changes=None):
    """The one line with which a run refuses its config."""
    capsys.readouterr()
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def cached_run(source, data, work, capsys):
    """What a run prints that caches, sorts pictures into buckets and drops captions."""
    changes = {"cache": work.parent / "cache", "export.kind": "folder", "buckets": True}
    flags = [*flags_of(source, data, {**changes, "caption_dropout": 0.3}), "--workdir", str(work)]
    assert train.main(flags) == 0
    told = capsys.readouterr().out
    assert "cached embeddings of 24" in told and "loss_t0.0625" in told
    assert train.main(flags) == 0 and "is finished" in capsys.readouterr().out
    return told


def assert_transformer_alone_changed(source, exported, others=("vae", "text_encoder", "tokenizer")):
    made, own = (load_file(folder / "transformer" / NAME) for folder in (exported, source))
    assert made.keys() == own.keys()
    assert all(not np.array_equal(x, made[key]) for key, x in own.items())
    for file in (file for other in others for file in (source / other).iterdir()):
        assert file.read_bytes() == (exported / file.relative_to(source)).read_bytes(), file


def assert_drawn_and_in_one_file(work, converted, architecture):
    """The run samples, and its single file is converted to its folder's bytes."""
    arguments = ["--workdir", str(work), "--prompt", "a fish", "--guidance", "5"]
    assert sample.main(arguments) == 0
    out = work.parent / "single"
    arguments = ["--workdir", str(work), "--out", str(out), "--kind", "single_file"]
    assert export.main(arguments) == 0
    (file,) = out.glob("*.safetensors")
    made = converted({k: x for k, x in torch_file(file).items() if not k.startswith("vae.")})
    exported = load_file(work / "export" / "transformer" / NAME)
    assert made.keys() == exported.keys()
    assert all(made[key].numpy().tobytes() == x.tobytes() for key, x in exported.items())
    with safe_open(file, "np") as opened:
        assert opened.metadata()["modelspec.architecture"] == architecture
    return file


def assert_zero_steps_keep_a_distilled_source(source, data, work, capsys):
    """Files are the same bytes, JSON the same content. The line that says what training does."""
    changes = {"total": "0_steps", "export.kind": "folder", "data.eval": ""}
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "distilled" in one]
    assert "training on pictures undoes a part of that" in line
    for file in (file for file in source.rglob("*") if file.is_file()):
        copy = work / "export" / file.relative_to(source)
        if file.suffix == ".json":
            assert json.loads(copy.read_bytes()) == json.loads(file.read_bytes())
        else:
            assert file.read_bytes() == copy.read_bytes(), file
    return line


def lora_run(source, data, work):
    """The PEFT file and kohya's file of a run with a LoRA, and its folder with merged weights."""
    assert train.main([*flags_of(source, data, LORA), "--workdir", str(work)]) == 0
    peft = work / "export" / "pytorch_lora_weights.safetensors"
    merged = work.parent / "merged"
    arguments = ["--workdir", str(work), "--out", str(merged), "--kind", "folder"]
    assert export.main(arguments) == 0
    (kohya,) = (work / "export").glob("*.kohya.safetensors")
    return peft, kohya, merged


def assert_goes_on(source, data, work, files):
    """A run from each file begins where the run ended that wrote it."""
    for name, file in files.items():
        again, place = {"lora.from": file, "total": "1_steps"}, work.parent / name
        assert train.main([*flags_of(source, data, again), "--workdir", str(place)]) == 0
        np.testing.assert_allclose(losses(place)[0], losses(work)[-1], rtol=1e-5)
