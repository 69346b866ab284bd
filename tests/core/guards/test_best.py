"""The best step by a measure, and the end of a run that no longer improves."""

import json

import pytest

from jaxft.core.errors import UserError
from jaxft.core.guards.best import (
    BEST_FILE,
    Best,
    Keep,
    Stop,
    check_best,
    direction,
    make_best,
    read_best,
)


def through(best, values, first=1):
    for step, value in enumerate(values, first):
        best = best.after(step, {best.measure: value})
    return best


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("loss", -1), ("ce", -1), ("kid-lite0", -1), ("mae", -1), ("perplexity", -1),
        ("lpips-vgg16", -1), ("accuracy", 1), ("macro_f1", 1), ("psnr", 1), ("rewards/margins", 1),
        ("rewards/accuracies", 1), ("r2", 1), ("caption_use", 1), ("tokens", 0), ("ln_k", 0),
        ("codebook_perplexity", 0), ("tokenizer_psnr", 0), ("pairs", 0), ("unigram_entropy", 0),
    ],
)  # fmt: skip
def test_every_measure_has_its_direction(name, way):
    assert direction(name) == way


@pytest.mark.parametrize(("measure", "sign"), [("loss", 1), ("eval_loss", 1), ("accuracy", -1)])
def test_the_best_of_many_is_the_first_of_the_least(measure, sign):
    best = make_best(Keep(measure), Stop(0))
    best = through(best, [sign * x for x in (3.0, 1.0, 2.0, 1.0, 4.0)])
    assert (best.step, best.value, best.waited) == (2, sign * 1.0, 3)
    assert not best.over, "a patience of 0 never ends a run"


def test_patience_counts_evaluations_since_the_best():
    best = make_best(Keep("loss"), Stop(2))
    seen = [through(best, values).over for values in ([2, 1], [1, 2], [1, 2, 2], [1, 2, 0.5])]
    assert seen == [False, False, True, False]


def test_the_model_before_training_is_never_the_best():
    assert make_best(Keep("loss"), Stop(1)).after(0, {"loss": 0.0}).step is None


def test_a_value_that_is_not_a_number_is_no_improvement():
    assert through(Best("mae"), [2.0, float("nan"), 1.0])[2:] == (3, 1.0, 0)
    assert through(Best("mae"), [2.0, float("nan")])[2:] == (1, 2.0, 1)


def test_a_resumed_run_goes_on_counting():
    best = make_best(Keep("loss"), Stop(3))
    whole = through(best, [2, 1, 3, 3, 3])
    part = through(best, [2, 1, 3])
    position = json.loads(json.dumps({"next_step": 3, **part.state()}))
    assert through(best.resumed(position), [3, 3], 4) == whole and whole.over
    assert best.resumed({"next_step": 3}) == best, "a checkpoint of an earlier version"
    off = Best("")
    assert off.after(1, {"loss": 1.0}) == off and off.state() == {} and off.resumed(position) == off


@pytest.mark.parametrize(
    ("measure", "words"),
    [("acuracy", "did you mean 'accuracy'"), ("tokens", "use keep.best=loss")],
)
def test_a_measure_that_cannot_be_compared_is_refused(measure, words):
    with pytest.raises(UserError, match=words):
        Best(measure).after(0, {"loss": 1.0, "accuracy": 1.0, "tokens": 9.0})


@pytest.mark.parametrize(
    ("keep", "stop", "held_out", "period", "words"),
    [
        ("", 2, "a.jsonl", "5_steps", "add keep.best=loss"),
        ("loss", 0, "", "5_steps", "data.eval, which is empty"),
        ("loss", 0, "a.jsonl", "0_steps", "set every.eval=50_steps"),
    ],
)
def test_keys_that_need_others_are_refused(keep, stop, held_out, period, words):
    with pytest.raises(UserError, match=words):
        check_best(Keep(keep), Stop(stop), held_out, period)


def test_a_torn_file_is_none(tmp_path):
    assert read_best(tmp_path) == {}
    for text in ("", "[1]", '{"step": null}'):
        (tmp_path / BEST_FILE).write_text(text)
        assert read_best(tmp_path) == {}
