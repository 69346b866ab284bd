"""A run whose training data has moved away: export of every kind, samples, verify, evaluation."""

import shutil

import pytest

from jaxft import evaluate, export, sample, train
from jaxft.tasks import TASKS, get_task
from jaxft.verify import main as verify
from tests import tiny_autoencoders, tiny_diffusion, tiny_image_tokens
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
LORA = {"lora.rank": 2, "trainable": ""}
OFF = {"total": "1_steps", "export.kind": "none"}


def llm(work, make_folder, records_file, make_flags):
    """(flags, the data that moves, the data that stays)."""
    moving = work / "train.jsonl"
    shutil.copy(records_file, moving)
    keys = {**OFF, **LORA, "lora.targets": ".*q_proj", "data.train": f"jsonl:{moving}"}
    flags = make_flags(make_folder(), {**keys, "batch_size": 8, "mesh.fsdp": 1})
    config = str(tiny_diffusion.ROOT / "configs" / "llm.py")
    return ["--config", config, *flags], moving, f"jsonl:{records_file}"


def diffusion(work, make_folder, records_file, make_flags):
    make_pipeline(work).save_pretrained(work / "model")
    stays = tiny_diffusion.make_pictures(work / "stays", 8)
    tiny_diffusion.make_pictures(work / "moves", 8)
    keys = {**OFF, **LORA, "lora.targets": r"unet\..*to_q", "eval_examples": 8}
    keys |= {"data.train": f"folder:{work / 'moves'}", "mesh.fsdp": 1}
    return tiny_diffusion.flags_of(work / "model", stays, keys), work / "moves", stays


def image_tokens(work, make_folder, records_file, make_flags):
    vq = tiny_autoencoders.make_vqmodel(work / "vq")
    stays = tiny_image_tokens.make_pictures(work / "stays", 8)
    moves = tiny_image_tokens.make_pictures(work / "moves", 8)
    keys = {**OFF, "graft": vq, "data.train": f"folder:{moves}", "mesh.fsdp": 1, "lora.rank": 0}
    flags = tiny_image_tokens.arguments(make_folder(), stays, work / "cache", work / "run", keys)
    return flags, moves, f"folder:{stays}"


def autoencoder(work, make_folder, records_file, make_flags):
    model = tiny_autoencoders.make_vae(work / "vae")
    stays, moves = (tiny_autoencoders.make_images(work / name) for name in ("stays", "moves"))
    keys = {**OFF, "data.train": f"folder:{moves}", "loss.perceptual": 0.0}
    keys = tiny_autoencoders.changes_of(model, stays, keys)
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", tiny_autoencoders.CONFIG, *flags], moves, f"folder:{stays}"


RUNS = {
    "llm": llm,
    "diffusion": diffusion,
    "image_tokens": image_tokens,
    "autoencoder": autoencoder,
}
NOT_HERE = {  # kinds that this run has nothing for
    "llm": (),
    "diffusion": ("inversion",),
    "image_tokens": ("adapter", "original"),
    "autoencoder": (),
}


@pytest.mark.parametrize("task", TASKS)
def test_commands_read_no_training_data(task, tmp_path, make_folder, records_file, make_flags):
    flags, moving, stays = RUNS[task](tmp_path, make_folder, records_file, make_flags)
    work = ["--workdir", str(tmp_path / "run")]
    assert train.main([*flags, *(() if "--workdir" in flags else work)]) == 0
    moving.rename(tmp_path / "elsewhere")
    for kind in get_task(task).writers:
        out = tmp_path / f"out-{kind}"
        done = export.main([*work, "--kind", kind, "--out", str(out)])
        assert done == (2 if kind in NOT_HERE[task] else 0), kind
        assert out.exists() == (kind not in NOT_HERE[task])
    prompted = sample.main([*work, "--prompt", "a red cat", "--max_new=4", "--steps=2"])
    assert prompted == (2 if task == "autoencoder" else 0)
    assert evaluate.main([*work, f"--config.data.eval={stays}"]) == 0
    whole = next(iter(get_task(task).writers))
    assert verify([str(tmp_path / f"out-{whole}"), "--out", str(tmp_path / "parity.json")]) == 0


def test_every_task_has_a_run():
    assert RUNS.keys() == TASKS.keys() == NOT_HERE.keys()
