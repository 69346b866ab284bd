"""CPU seconds of a step of several LoRA adapters over one frozen base, beside a step of one.

python tools/sweep_cost.py [--adapters 8] [--tokens 32] [--rounds 5]

The adapters of a sweep train on the same rows, by jax.vmap over their parameters and moments.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benching import machine, machine_line

from jaxft.core.config import load_config
from jaxft.core.params import bind
from jaxft.core.step import sample_keys
from jaxft.objectives.next_token import NextToken
from jaxft.runs.opening import load_params, open_run
from jaxft.tasks import OPTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of the one row of a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keys = (("lora.rank", "8"), ("batch_size", "1"), ("seq_len", str(args.tokens)))
    run = open_run(load_config("configs/llm.py", keys, OPTIONS))
    with jax.set_mesh(run.mesh):
        params = load_params(run)
        one, several = _steps(run, params, args)
        ratios = []
        for _ in range(args.rounds):  # in pairs, because the load of a machine changes
            costs = [_cost(step, given) for step, given in (one, several)]
            ratios.append(costs[1] / costs[0])
            print(f"one {costs[0]:.2f}, {args.adapters} adapters {costs[1]:.2f} CPU-s a step")
    low, high = min(ratios), max(ratios)
    print(
        f"{args.adapters} adapters cost {np.median(ratios):.2f} steps of one ({low:.2f} to"
        f" {high:.2f}) at {args.tokens} tokens a step. {machine_line(machine())}"
    )


def _steps(run: Any, params: Any, args: argparse.Namespace) -> list[tuple[Any, tuple]]:
    """Return (compiled step, its arguments) of one adapter, and of several."""
    tx = optax.adamw(1e-4)
    tokens = np.random.default_rng(0).integers(5, 40000, (1, args.tokens), np.int32)
    ones = jnp.ones(tokens.shape)
    batch = {
        "tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": ones,
        "segment_ids": ones.astype(int), "positions": np.arange(args.tokens)[None],
        "sample_ids": jnp.zeros(1, int),
    }  # fmt: skip
    objective = NextToken(run.opened.dtype, args.tokens, args.tokens)
    frozen = {path: x for path, x in params.items() if path not in run.chosen}

    def step(trained: Any, moments: Any, frozen: Any) -> tuple[Any, Any]:
        def loss(trained: Any) -> jax.Array:
            model = bind(run.opened.template, {**frozen, **trained}, run.opened.dtype)
            total, _ = objective.loss(model, batch, sample_keys(0, 0, batch["sample_ids"]), 0)
            return total[0] / total[1]

        updates, moments = tx.update(jax.grad(loss)(trained), moments, trained)
        return optax.apply_updates(trained, updates), moments

    trained = {path: params[path] for path in run.chosen}
    stacked = jax.tree.map(lambda x: jnp.stack([x] * args.adapters), trained)
    cases = ((step, trained, tx.init(trained)),)
    cases += ((jax.vmap(step, (0, 0, None)), stacked, jax.vmap(tx.init)(stacked)),)
    return [
        (jax.jit(made).lower(own, moments, frozen).compile(), (own, moments, frozen))
        for made, own, moments in cases
    ]


def _cost(step: Any, given: tuple, times: int = 3) -> float:
    """Return the CPU seconds of one call, the mean of `times`."""
    jax.block_until_ready(step(*given))
    began = time.process_time()
    for _ in range(times):
        jax.block_until_ready(step(*given))
    return (time.process_time() - began) / times


if __name__ == "__main__":
    main()
