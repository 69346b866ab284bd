"""Eight virtual CPU devices and exact fp32 matmuls for every test, and small real-format models."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # commands do not re-exec

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = [
    "a small brown animal that lives in trees",
    "the act of giving something away",
    "a tall plant with a hard stem, found in warm countries of the south; it bears fruit",
    "water",
    "a person who makes bread and cakes and sells them in a shop in the morning",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_make_parametrize_id(val, argname):
    """Bytes by their argument's name: a gzip header holds the time, and workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes a file at a time: runs and models that a file's tests share are made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files of few tests are the long ones
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free the compiled programs of a file: thousands exhaust the memory maps of a process."""
    import gc

    import jax

    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def quick():
    """One device, and code that compiles fast: for what lies on disk, not how it was computed."""
    import jax

    from jaxft.core import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *sizes: sharding.one_device_mesh())
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_thread():
    """Of torch's, where all is so small that more would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer of 320 tokens with <s>, </s> and <pad>, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, tokenizer_folder):
    """`make_folder(tied=…, dtype=…, shard=…)`: a tiny random Llama as transformers saves it."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied=False, dtype="float32", shard="1GB", **changes):
        torch.manual_seed(0)
        shape = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "initializer_range": 0.2,
        }
        config = LlamaConfig(**{**shape, **changes}, tie_word_embeddings=tied)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder, max_shard_size=shard)
        for file in Path(tokenizer_folder).iterdir():
            shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def chat_folder(make_folder, tmp_path_factory):
    """A tiny Llama with a chat template, whose end of turn generation_config.json leaves out."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(make_folder(vocab_size=330), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    """Forty prompt / completion records of very unequal lengths."""
    file = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = [
        {"prompt": f"{i}: {LINES[i % 5]}", "completion": " " + LINES[(i * 3 + 1) % 5][: 3 + i]}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def small_run(records_file):
    """`small_run(folder, {"optim.lr": 1e-3})`: keys that point configs/llm.py at a small model."""

    def keys(folder, changes=None):
        places = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{records_file}")
        return {"model": str(folder), **places, "seq_len": 48, **(changes or {})}

    return keys


@pytest.fixture(scope="session")
def make_flags(small_run):
    """The same as command-line flags."""

    def flags(folder, changes=None):
        return [f"--config.{key}={value}" for key, value in small_run(folder, changes).items()]

    return flags


@pytest.fixture(scope="session")
def make_config(small_run):
    """`make_config(folder, {"optim.lr": 1e-3})`: configs/llm.py with those keys, for 8 devices."""
    from jaxft.core.config import load_config

    def make(folder, changes=None):
        config = load_config(str(ROOT / "configs" / "llm.py"))
        defaults = {"total": "10_steps", "mesh.fsdp": 8}
        for key, value in small_run(folder, {**defaults, **(changes or {})}).items():
            *sections, leaf = key.split(".")
            node = config
            for section in sections:
                node = node[section]
            assert leaf in node, key
            node[leaf] = value
        return config

    return make
