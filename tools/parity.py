"""Certificates of small random models of every architecture, and of SPECs, into docs/parity.md.

python tools/parity.py [SPEC …]     all of the page, which takes half an hour on 2 cores
python tools/parity.py pipelines    the table of pipelines alone
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_llm import SHAPES, make_random
from benching import DOCS, machine, machine_line

from jaxft.verify import certify
from tests.tiny_flux import make_flux
from tests.tiny_klein import make_klein
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, llama3 rope": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral, window 512": {"model_type": "mistral", "sliding_window": 512},
    "ministral3, yarn rope, queries that grow": {
        "model_type": "ministral3",
        "head_dim": 16,
        "rope_parameters": {
            **YARN,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3, yarn rope": {"model_type": "qwen3", "rope_parameters": YARN, "head_dim": 16},
    "smollm3, every 4th layer NoPE": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    },
    "phi3, longrope beyond 2048 on 3/4 of a head": {
        "model_type": "phi3",
        "original_max_position_embeddings": 2048,
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 12.0],
        },
    },
    "granite, four multipliers": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "gemma2, soft-caps, every 2nd layer of window 512": {
        "model_type": "gemma2",
        "num_hidden_layers": 5,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 512,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text, 5 windows of 512 to 1": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 512,
    },
    "gemma3 with pictures, 5 windows of 512 to 1": {
        "model_type": "gemma3",
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "text_config": {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 512,
        },
    },
    "mixtral, 2 of 8 experts": {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 512,
    },
    "qwen3_moe, 4 of 16 experts": {
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "gpt_oss, sinks, 2 of 8 experts, every 2nd layer of window 512": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 512,
        "rope_parameters": {**YARN, "truncate": False},
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3, yarn rope on full layers": {
        "model_type": "olmo3",
        "num_hidden_layers": 5,
        "sliding_window": 512,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
}


PARITY = """# Parity with PyTorch

Compare jaxft with stock transformers, both in fp32 on the CPU. `python tools/parity.py` generates
this page, and each row is one `python -m jaxft.verify`. Lower is better:

- near, far, long: the largest difference of logits at positions 0-63, at 4096-4159, and at the end
  of a row of 4160 tokens.
- KL: KL(torch || jaxft) summed over the vocabulary, the largest over all positions.
- loss: the difference of the loss.
- gradients: the difference for the worst tensor, relative to its norm.
- bytes: the number of tensors whose bytes differ after import and export.

A bound is 6 times the rounding error of the oracle. The same run measures this error as
transformers in fp32 against transformers in fp64. For the KL, which grows with the square, the
bound is 36 times. No byte may differ, and no weight may differ from the one that transformers
loads.

One difference is intended. transformers gives the embedding of `pad_token_id` no gradient, even
if that id is a token of the text (such as an end-of-turn token). jaxft masks by spans, never by
id.

| model | near | far | long | KL | loss | gradients | bytes | |
|---|---|---|---|---|---|---|---|---|"""


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "Stable Diffusion 1.5": make_pipeline,
    "Stable Diffusion XL": lambda work: make_pipeline(work, "sdxl"),
    "Stable Diffusion 3.5, with T5": make_sd3,
    "Stable Diffusion 3.5, without T5": lambda work: make_sd3(work, t5=False),
    "FLUX.1-dev": make_flux,
    "FLUX.1-schnell": lambda work: make_flux(work, "schnell"),
    "FLUX.2 klein": lambda work: make_klein(),
    "Z-Image": lambda work: make_zimage(),
}
PIPELINES_TEXT = """
## Pipelines

Small random pipelines beside diffusers and transformers, in the same way. Each figure is relative
to the largest value of the output:

- texts, VAE, denoiser: the worst output of the text encoders, of the VAE, and of the UNet or
  transformer. Latents are not square.
- pictures: after five steps with guidance 4, from the same noise and captions.
- gradients: the difference for the worst tensor of all networks, relative to its norm.
- bytes: as above, over all networks.

| pipeline | texts | VAE | denoiser | pictures | gradients | bytes | |
|---|---|---|---|---|---|---|---|"""


def main(specs: list[str]) -> None:
    page = DOCS / "parity.md"
    end = "\n".join([PIPELINES_TEXT, *pipeline_rows(), "", machine_line(machine()), ""])
    start = page.read_text().partition(PIPELINES_TEXT)[0]
    if specs != ["pipelines"]:
        start = "\n".join([PARITY, *decoder_rows(specs), "", machine_line(machine()), ""])
    page.write_text(start + end)


def decoder_rows(specs: list[str]) -> list[str]:
    """Return the certificate of each of ARCHITECTURES, and of `specs`, as a row."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="jaxft-parity-") as name:
        for title, changes in ARCHITECTURES.items():
            folder = Path(name) / re.sub(r"\W+", "-", title)
            make_random(folder, _random_config(changes))
            rows.append(_parity_row(f"{title} (random)", certify(str(folder))[0]))
        rows += [_parity_row(spec, certify(spec)[0]) for spec in specs]
    return rows


def pipeline_rows() -> list[str]:
    """Return the certificate of each of PIPELINES as a row."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="jaxft-parity-") as name:
        for title, make in PIPELINES.items():
            work = Path(name) / re.sub(r"\W+", "-", title)
            work.mkdir()
            make(work).save_pretrained(work / "folder")
            rows.append(_pipeline_row(title, certify(str(work / "folder"))[0]))
    return rows


def _pipeline_row(title: str, certificate: dict[str, Any]) -> str:
    checks = {check["name"]: check["figure"] for check in certificate["checks"]}
    outputs = {name: x for name, x in checks.items() if name.endswith(", max relative")}
    starts = ("text_encoder", "vae", ("unet", "transformer"), "pictures")
    cells = [max(x for name, x in outputs.items() if name.startswith(one)) for one in starts]
    cells.append(max(x for name, x in checks.items() if name.endswith("gradients, worst relative")))
    differing = sum(x for name, x in checks.items() if "round trip" in name)
    verdict = "pass" if certificate["passed"] else "**FAIL**"
    shown = " | ".join(f"{cell:.1e}" for cell in cells)
    return f"| {title} (random) | {shown} | {differing} | {verdict} |"


def _random_config(changes: dict[str, Any]) -> dict[str, Any]:
    shape = {**SHAPES["tiny"], "max_position_embeddings": 8192, "initializer_range": 0.2}
    if "text_config" in changes:
        return {**changes, "text_config": {**shape, **changes["text_config"]}}
    return {**shape, **changes}


def _parity_row(title: str, certificate: dict[str, Any]) -> str:
    figures = {check["name"]: check["figure"] for check in certificate["checks"]}
    cells = [figures.get(f"{name} logits, max abs") for name in ("near", "far", "long")]
    cells.append(max(value for name, value in figures.items() if "KL" in name))
    cells += [figures["loss, abs"], figures["gradients, worst relative"]]
    shown = ["" if cell is None else f"{cell:.1e}" for cell in cells]
    shown.append(str(figures["round trip, differing tensors"]))
    verdict = "pass" if certificate["passed"] else "**FAIL**"
    return f"| {title} | {' | '.join(shown)} | {verdict} |"


if __name__ == "__main__":
    main(sys.argv[1:])
