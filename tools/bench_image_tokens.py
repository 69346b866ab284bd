"""An image drawn and a training step of an image-token model: jaxft beside PyTorch."""

import argparse
import json
import os
import tempfile
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

STOCK = "transformers' generate"


def bench_image_tokens(args: argparse.Namespace) -> None:
    start(False)
    import torch

    from jaxft.demo import demo_path

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = demo_path(args.model, "model") or Path(args.model)
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        drawing = _compare_drawing(args, folder, Path(name))
        training = _compare_training(args, folder, Path(name))
    settings = {key: getattr(args, key) for key in ("model", "data", "batch", "steps", "guidance")}
    settings |= {"dtype": "float32", "codes": _codes(folder)}
    results = {"an image": drawing, "a training step": training}
    record = {"settings": settings, "machine": machine(), "results": results}
    report("image-tokens-cpu", record, _section(record), args.out)


def _codes(folder: Path) -> int:
    """Of an image."""
    rows, columns = json.loads((folder / "imagetoken.json").read_text())["grid"]
    return rows * columns


def _open(args: argparse.Namespace, folder: Path, work: Path, batch: int) -> Any:
    """The run that trains this folder's model; pictures are encoded into a cache of its own."""
    from jaxft.models.autoencoders.vq_config import VQConfig

    side = json.loads((folder / "imagetoken.json").read_text())
    vq = folder / "vq" / "config.json"
    factor = VQConfig.from_hf(json.loads(vq.read_text()), str(vq)).factor
    changes = {
        "model": str(folder),
        "data.train": args.data,
        "cache": str(work / "cache"),
        "resolution": side["grid"][0] * factor,
        "batch_size": batch,
        "caption_dropout": 0.0,
    }
    return open_run("image_tokens", changes)


# ---- an image -----------------------------------------------------------------------------


def _compare_drawing(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    """The codes of one picture at temperature 0, with guidance; the same ones on all sides."""
    import jax

    from jaxft.tasks import Request
    from tests import whole as runs

    run = _open(args, folder, work, 1)
    caption = run.train.caption(0)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)

    def draw() -> float:
        with jax.set_mesh(run.mesh):
            request = Request(guidance=args.guidance, temperature=0.0)
            return _checksum(run.preview._sample(params, [caption], request)[0])

    peers = [_stock(args, folder, caption, compiled=False)]
    if not args.no_compile:
        peers.append(_stock(args, folder, caption, compiled=True))
    ours = [Contestant("jaxft", draw)]
    return compare(ours, peers, args.steps, 0.0, "checksum of codes")


def _checksum(codes: Any) -> float:
    """A number that changes with any code and with their order."""
    flat = codes.ravel().astype(int)
    return float(sum(place * int(code) for place, code in enumerate(flat, 1)))


def _stock(args: argparse.Namespace, folder: Path, caption: str, compiled: bool) -> Contestant:
    """generate as docs/image_tokens.md writes it, on a model as it is or through torch.compile."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    side = json.loads((folder / "imagetoken.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=True)
    prompt = tokenizer(side["prompt"].replace("{caption}", caption))["input_ids"]
    tokens = torch.tensor([[*prompt, side["boi"]]])
    null = torch.tensor([[side["null"], side["boi"]]])

    def draw() -> float:
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=_codes(folder),
            do_sample=False,
            guidance_scale=args.guidance,
            negative_prompt_ids=null,
            suppress_tokens=list(range(side["image_offset"])),
            pad_token_id=side["pad"],
        )
        return _checksum(made[:, tokens.shape[1] :].numpy() - side["image_offset"])

    return Contestant(f"{STOCK}, compiled" if compiled else STOCK, draw)


# ---- a training step ----------------------------------------------------------------------


def _compare_training(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    """All weights, on the same rows: mean cross-entropy of the codes after their captions."""
    import jax

    from jaxft.core.sharding import local_rows
    from tests import whole as runs

    run = _open(args, folder, work, args.batch)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        run.encode(params, run.chosen)
    batch = next(run.train.batches(0, local_rows(run.mesh, args.batch)))
    ours = jaxft_contestants(run, {"jaxft": batch}, params)
    del params
    return compare(ours, _torch_contestants(args, folder, batch), args.steps, 1e-4)


def _torch_contestants(args: argparse.Namespace, folder: Path, batch: dict) -> list[Contestant]:
    """The plain loop over transformers' model, as it is and through torch.compile."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens, targets = _rows(folder, batch)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).train()
    optimizer = torch_adamw(model)

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    inputs = (tokens, targets)
    return torch_contestants(loss_of, inputs, optimizer, False, not args.no_compile)


def _rows(folder: Path, batch: dict) -> tuple[Any, Any]:
    """(tokens, targets) of `prompt BOI codes`, padded on the right to the batch's longest row."""
    import torch

    side = json.loads((folder / "imagetoken.json").read_text())
    rows = [
        [*prompt[:length].tolist(), side["boi"], *(side["image_offset"] + codes).tolist()]
        for prompt, length, codes in zip(
            batch["prompt"], batch["length"], batch["codes"].astype(int), strict=True
        )
    ]
    count, longest = batch["codes"].shape[1], max(map(len, rows))
    whole = torch.tensor([row + [side["pad"]] * (longest - len(row)) for row in rows])
    targets = whole[:, 1:].clone()
    for i, row in enumerate(rows):
        targets[i, : len(row) - 1 - count] = -100
        targets[i, len(row) - 1 :] = -100
    return whole[:, :-1], targets


def _section(record: dict[str, Any]) -> str:
    s, results = record["settings"], record["results"]
    drawing, training = (results[key]["steps"] for key in ("an image", "a training step"))
    faster = drawing[STOCK]["median_s"] / drawing["jaxft"]["median_s"]
    eager = training["torch eager"]["median_s"] / training["jaxft"]["median_s"]
    lines = [
        f"{s['model']}, {s['dtype']}, compilation not counted, median of {s['steps']} interleaved"
        f" rounds, before each an untimed one. An image: {s['codes']} codes of one caption of"
        f" {s['data']}, guidance {s['guidance']:g}, temperature 0, the same codes on all sides; the"
        f" VQ decoder is in none of them. A training step: all weights, batch {s['batch']}, AdamW"
        " (torch: fused), rows padded to the batch's longest in torch and to the longest of the set"
        " in jaxft. Ratio: the best torch / jaxft; above 1 jaxft is faster.",
        "",
        *steps_table(results),
        "",
        f"Against {STOCK} as it is, jaxft draws {faster:.1f} times as fast; against the plain loop,"
        f" torch eager, it trains {eager:.2f} times as fast.",
    ]
    return "\n".join([*lines, "", machine_line(record["machine"])])
