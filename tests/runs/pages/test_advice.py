"""Advice is given where its numbers hold, and only there."""

import pytest

from jaxft.runs.pages.advice import advice
from jaxft.runs.pages.records import History

CONFIG = {"data": {"eval": "a.jsonl"}, "every": {"eval": "10_steps"}, "batch_size": 1}


def run(evals, losses=(2.0, 1.0), config=None, manifest=None, before=None, norms=0.5, waits=0.0):
    """Advice of a run with evaluations at 0, 10, … and these training losses."""
    train = [
        {"step": i + 1, "loss": x, "grad_norm": norms, "data_wait_share": waits}
        for i, x in enumerate(losses)
    ]
    records = [{"step": 10 * i, "eval_loss": x} for i, x in enumerate(evals)]
    first = {"loss": evals[0]} if evals else {}
    history = History(train, records)
    return " ".join(advice(CONFIG | (config or {}), manifest or {}, before or first, history))


FALLING = [3 - i / 20 for i in range(40)]


@pytest.mark.parametrize(
    ("evals", "losses", "words"),
    [
        ([3, 2, 2.5, 2.8], FALLING, "lowest at step 10 (2) and rose to 2.8"),
        ([3, 2, 1.5], FALLING, "still fell by 25.0% between the last two evaluations"),
        ([3, 3.5], FALLING, "is higher than before training (3 before, 3.5 now)"),
        ([3, 2.999, 2.999], [3.0] * 40, "hardly changed (3 in the first tenth"),
    ],
)
def test_a_shape_of_the_curves_is_named(evals, losses, words):
    assert words in run(evals, losses)


@pytest.mark.parametrize(
    ("evals", "losses", "words"),
    [
        ([3, 2, 2.5, 2.8], [1.0] * 20 + [2.0] * 20, "overfitting"),  # training rose too
        ([3, 2, 2.01, 2.02], FALLING, "overfitting"),  # within the noise
        ([3, 0.005, 0.004], FALLING, "longer total"),  # a part of nothing
        ([3, 2, 1], FALLING, "higher than before"),
        ([3, 2, 1], FALLING, "hardly changed"),
    ],
)
def test_other_shapes_are_not(evals, losses, words):
    assert words not in run(evals, losses)


def test_keep_best_is_proposed_where_it_is_off():
    shape = [3, 2, 2.5, 2.8]
    assert "keep.best=loss" in run(shape, FALLING)
    assert "keep.best=loss" not in run(shape, FALLING, {"keep": {"best": "loss"}})


def test_a_run_without_held_out_data_is_told_so():
    assert "--config.data.eval" in run([], FALLING, {"data": {"eval": ""}})


def test_a_run_with_two_evaluations_is_told_of_the_period():
    never = {"every": {"eval": "0_steps"}}
    history = History([], [{"step": 0, "eval_loss": 2.0}, {"step": 50, "eval_loss": 1.0}])
    assert "every.eval=5_steps" in " ".join(advice(CONFIG | never, {}, {"loss": 2.0}, history))
    assert "every.eval=" not in run([3, 2, 1], FALLING)


def test_gradients_data_and_counts():
    clipped = {"optim": {"clip": 1.0}}
    assert "above optim.clip=1 in 100%" in run([3, 1], FALLING, clipped, norms=2.0)
    assert "optim.clip" not in run([3, 1], FALLING, clipped, norms=0.5)
    assert "waited for data 40%" in run([3, 1], FALLING, waits=0.4)
    assert "waited" not in run([3, 1], FALLING, waits=0.1)
    counts = {"data": {"examples": 2, "truncated": 1200, "bad": 0}}
    found = run([3, 1], FALLING, manifest=counts)
    assert "used about 20 times" in found and "1,200 texts were longer than seq_len" in found
    assert "could not be read" not in found
