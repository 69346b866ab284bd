"""Advice on what to try next, by plain rules from the numbers of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.runs.pages.records import History

CLEAR = 0.02  # a relative change above this one is not noise of the evaluation
WAITS = 0.2  # share of the time that steps wait for data
REPEATED = 10  # passes over the data, above which a small set is learned by heart


def advice(
    config: Mapping[str, Any], manifest: Mapping[str, Any], before: Mapping[str, float], h: History
) -> list[str]:
    """Return sentences about what the numbers show and which key to change."""
    return [
        *_evaluations(config, before, h),
        *_steps(config, h),
        *_data(config, manifest, h),
    ]


def _evaluations(
    config: Mapping[str, Any], before: Mapping[str, float], h: History
) -> Iterator[str]:
    data, every = config.get("data") or {}, config.get("every") or {}
    if not data.get("eval"):
        yield (
            "Nothing was held out, so nothing here says how the model does on new examples: give"
            " records that it does not train on with --config.data.eval."
        )
        return
    key = next((k for k in ("eval_loss", "eval_ce") if h.curve(k, True)[0]), "")
    steps, values = h.curve(key, True)
    trained = [pair for pair in zip(steps, values, strict=True) if pair[0] > 0]
    if not trained:
        return
    name, (last, value) = key.replace("eval_", "held-out "), trained[-1]
    first = before.get(key.removeprefix("eval_"))
    best_step, best = min(trained, key=lambda pair: pair[1])
    kept = (config.get("keep") or {}).get("best")
    if first is not None and value > first * (1 + CLEAR):
        yield (
            f"The {name} is higher than before training ({first:.4g} before, {value:.4g} now):"
            " lower optim.lr, train fewer steps, or check that data.eval is like data.train."
        )
    if value > best * (1 + CLEAR) and _fell(h, best_step):
        keep = "" if kept else ", or set keep.best=loss to export the best step"
        yield (
            f"The {name} was lowest at step {best_step} ({best:.4g}) and rose to {value:.4g} while"
            f" the training loss went on falling, which is overfitting: try"
            f" --config.total={best_step}_steps{keep}, or give more data."
        )
    elif len(trained) > 1 and best_step == last and _still_falls(values):
        yield (
            f"The {name} still fell by {1 - value / trained[-2][1]:.1%} between the last two"
            f" evaluations (steps {trained[-2][0]} and {last}): a longer total may improve it more."
        )
    if len(trained) < 2 and last > 10 and every.get("eval") == "0_steps":
        yield (
            "The model was evaluated only before and after training, so a better step in between"
            f" would not show: set --config.every.eval={max(1, last // 10)}_steps."
        )


def _still_falls(values: Sequence[float]) -> bool:
    """Return whether the last evaluation gained a part of its value and of the whole gain."""
    gain = values[-2] - values[-1]
    return gain > CLEAR * abs(values[-1]) and gain > CLEAR * (values[0] - values[-1])


def _fell(h: History, since: float) -> bool:
    """Return whether the training loss fell after a step, as means of two equal halves."""
    values = [r["loss"] for r in h.train if r["step"] > since and r.get("loss") is not None]
    half = len(values) // 2
    return half > 0 and sum(values[-half:]) < sum(values[:half])


def _steps(config: Mapping[str, Any], h: History) -> Iterator[str]:
    _, losses = h.curve("loss")
    part = len(losses) // 10
    if part >= 3:
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        if abs(first - last) < CLEAR / 2 * abs(first):
            yield (
                f"The training loss hardly changed ({first:.4g} in the first tenth of the steps,"
                f" {last:.4g} in the last): a higher optim.lr or more steps may be needed."
            )
    clip = (config.get("optim") or {}).get("clip") or 0
    _, norms = h.curve("grad_norm")
    clipped = sum(norm > clip for norm in norms)
    if clip and len(norms) >= 20 and clipped > 0.9 * len(norms):
        yield (
            f"The gradient was above optim.clip={clip:g} in {clipped / len(norms):.0%} of the"
            " steps, so nearly every update was scaled down: a higher optim.clip would let its size"
            " vary."
        )
    _, waits = h.curve("data_wait_share")
    later = waits[1:]
    if later and (share := sum(later) / len(later)) > WAITS:
        cached = ", and set cache to encode pictures once" if config.get("cache") == "" else ""
        yield (
            f"The steps waited for data {share:.0%} of the time: put the data on a faster"
            f" disk{cached}."
        )


def _data(config: Mapping[str, Any], manifest: Mapping[str, Any], h: History) -> Iterator[str]:
    counts = manifest.get("data") or {}
    examples = next((counts[k] for k in ("examples", "images", "pairs") if counts.get(k)), 0)
    if not isinstance(examples, int):
        return
    passes = h.last * config.get("batch_size", 0) / examples if examples else 0
    if passes > REPEATED:
        yield (
            f"Each of the {examples:,} examples was used about {passes:.0f} times: more data, or"
            " fewer steps, lower the risk that the model learns them by heart."
        )
    for key, what, remedy in (
        ("truncated", "texts were longer than seq_len and were cut", "raise seq_len"),
        ("too_long", "conversations were dropped, as a round of them is longer than seq_len",
         "raise seq_len"),
        ("truncated_captions", "captions were longer than the text encoder reads and were cut",
         "write the important words first"),
        ("bad", "examples could not be read and were left out", "see bad_samples.jsonl"),
    ):  # fmt: skip
        count = counts.get(key)
        if isinstance(count, int) and count:
            yield f"{count:,} {what}: {remedy}."
