"""Memory of the loss head, dense against chunked, by XLA's own account: python tools/memory.py

Nothing is run: the programs are compiled and `memory_analysis()` is read. Writes its section of
docs/performance.md.
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from jaxft.kernels.cross_entropy import linear_cross_entropy  # noqa: E402

ROWS, LENGTH, DIM, VOCAB = 4, 1024, 2048, 128256
START, END = "<!-- memory -->", "<!-- /memory -->"


def dense(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
    """What one would write first: whole logits, optax's cross-entropy."""
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def chunked(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
    """jaxft's loss head."""
    return linear_cross_entropy(hidden, head, targets, weights, vocab_first=True)[0]


def temporaries(loss: Any, trained: tuple[int, ...]) -> float:
    """MiB beside arguments and results of loss and gradients."""
    s = jax.ShapeDtypeStruct
    args = (
        s((ROWS, LENGTH, DIM), jnp.float32),
        s((VOCAB, DIM), jnp.float32),
        s((ROWS, LENGTH), jnp.int32),
        s((ROWS, LENGTH), jnp.float32),
    )
    compiled = jax.jit(partial(jax.value_and_grad, argnums=trained)(loss)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    """Print and write the table."""
    rows = [
        (name, *(temporaries(loss, trained) for loss in (dense, chunked)))
        for name, trained in (("head trained", (0, 1)), ("head frozen (LoRA)", (0,)))
    ]
    logits = ROWS * LENGTH * VOCAB * 4 / 2**20
    text = [
        START,
        f"{ROWS} x {LENGTH} tokens, width {DIM}, vocabulary {VOCAB}, fp32: whole logits would be"
        f" {logits:.0f} MiB. Temporaries of loss and gradients by XLA's `memory_analysis()`,"
        f" jax {jax.__version__}, {jax.default_backend()} (`python tools/memory.py`):",
        "",
        "| | dense, MiB | jaxft, MiB |",
        "|---|---|---|",
        *(f"| {name} | {before:.0f} | {after:.0f} |" for name, before, after in rows),
        END,
    ]
    section = "\n".join(text)
    print(section)
    file = ROOT / "docs" / "performance.md"
    old = file.read_text()
    pattern = re.compile(f"{START}.*{END}", re.DOTALL)
    new = (
        pattern.sub(section, old) if START in old else f"{old.rstrip()}\n\n## Memory\n\n{section}\n"
    )
    file.write_text(new)


if __name__ == "__main__":
    main()
