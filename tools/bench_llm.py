"""One training step of a language model: jaxft beside PyTorch + transformers."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benching import (
    Contestant,
    compare,
    jaxft_contestants,
    machine,
    machine_line,
    open_run,
    report,
    start,
    steps_table,
    torch_adamw,
    torch_contestants,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 8, 16
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def bench_llm(args: argparse.Namespace) -> None:
    start(args.gpu)
    args.seq = args.seq or (2048 if args.gpu else 256)
    kinds = [kind for kind in ("full", "lora") if not (args.full or args.lora) or vars(args)[kind]]
    results: dict[str, Any] = {}
    with _model_folder(args) as folder:
        for kind in kinds:
            results[kind] = _compare_steps(args, folder, RANK if kind == "lora" else 0)
    shown = {key: getattr(args, key) for key in ("batch", "seq", "steps")}
    shown |= {"model": args.shape or args.model, "dtype": "bfloat16" if args.gpu else "float32"}
    record = {"settings": shown, "machine": machine(), "results": results}
    report(f"llm-{'gpu' if args.gpu else 'cpu'}", record, _section(record), args.out)


@contextmanager
def _model_folder(args: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        folder = Path(name) / "model"
        if args.shape:
            make_random(folder, {**SHAPES[args.shape], "max_position_embeddings": 8192})
        else:
            write_folder(argparse.Namespace(model=args.model, target=str(folder)))
        yield folder


def write_folder(args: argparse.Namespace) -> None:
    """A copy that stock transformers reads, whatever the model came as."""
    import shutil

    from jaxft.verify import hf_folder
    from jaxft.weights.folders.transformers import open_source

    with hf_folder(open_source(args.model)) as folder:
        shutil.copytree(folder, args.target)


def make_random(folder: Path, config: dict[str, Any]) -> None:
    """A random model as transformers saves it, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    kind = config.get("model_type", "llama")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(kind, **settings, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    AutoModelForCausalLM.from_config(made).float().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {token: i for i, token in enumerate(["<unk>", "</s>", *alphabet])}
    bytewise = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def _compare_steps(args: argparse.Namespace, folder: Path, rank: int) -> dict[str, Any]:
    ours, batch = _jaxft_contestants(args, folder, rank)
    theirs = _torch_contestants(args, folder, rank, batch)
    return compare(ours, theirs, args.steps, 5e-2 if args.gpu else 1e-4)


def _jaxft_contestants(
    args: argparse.Namespace, folder: Path, rank: int
) -> tuple[list[Contestant], dict]:
    """jaxft's step on a fixed batch, and that batch."""
    import numpy as np

    from jaxft.core.sharding import local_rows

    changes = {
        "model": str(folder),
        "data.train": "demo:novel/train",
        "seq_len": args.seq,
        "pack": False,
        "batch_size": args.batch,
        "lora.rank": rank,
    }
    run = open_run("llm", changes)
    batch = next(run.train.batches(0, local_rows(run.mesh, args.batch)))
    vocab = run.opened.model_cfg.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (args.batch, args.seq + 1), np.int32)
    batch |= {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    batch |= {"weights": np.ones_like(batch["weights"])}
    batch |= {"segment_ids": np.ones_like(batch["segment_ids"])}
    return jaxft_contestants(run, {"jaxft": batch}), batch


def _torch_contestants(
    args: argparse.Namespace, folder: Path, rank: int, batch: dict
) -> list[Contestant]:
    """The plain loop over transformers' model, as it is and through torch.compile."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if args.gpu else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).to(device)
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=TARGETS))
    model.train()
    optimizer = torch_adamw(model)
    ids, targets = (torch.tensor(batch[k], device=device).long() for k in ("tokens", "targets"))

    def loss_of(ids: Any, targets: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=args.gpu):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return torch_contestants(loss_of, (ids, targets), optimizer, args.gpu)


def _section(record: dict[str, Any]) -> str:
    s = record["settings"]
    lines = [
        f"One training step, {s['model']}, batch {s['batch']} x {s['seq']} tokens, {s['dtype']},"
        f" AdamW (torch: fused), median of {s['steps']} interleaved rounds,"
        " before each an untimed one. Ratio: the better torch / jaxft; above 1 jaxft is faster.",
        "",
        *steps_table(record["results"]),
    ]
    return "\n".join([*lines, "", machine_line(record["machine"])])
