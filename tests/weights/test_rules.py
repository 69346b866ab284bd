"""The weight table: bijections, stacking, placeholders, and every offender in one error."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf
from jaxft.weights.rules import Entry, Rule, expected, plan, rearranged_shape, to_jax, to_torch


def leaf(*shape, stacked=False):
    axes = ("layers",) * stacked + (None,) * (len(shape) - stacked)
    return Leaf(shape, np.dtype(np.float32), axes)


def numbered(*shape):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@st.composite
def layouts(draw):
    """(layout, sizes, torch shape): random names in random groups on the left, permuted right."""
    names = draw(st.permutations("abcde"))[: draw(st.integers(1, 5))]
    lengths = {name: draw(st.integers(1, 4)) for name in names}
    cuts = sorted({0, len(names), *draw(st.lists(st.integers(0, len(names)), max_size=3))})
    groups = [names[low:high] for low, high in pairwise(cuts)]
    groups = [group for group in groups if group]
    # At most one name of a group may be left to its length; a literal 1 may stand anywhere.
    open_names = {draw(st.sampled_from(group)) for group in groups}
    known = set(names) - open_names
    left = [f"({' '.join(g)})" if len(g) > 1 else g[0] for g in groups]
    shape = [int(np.prod([lengths[n] for n in g])) for g in groups]
    if draw(st.booleans()):
        place = draw(st.integers(0, len(left)))
        left.insert(place, "1")
        shape.insert(place, 1)
    right = draw(st.permutations(names))
    sizes = {name: lengths[name] for name in known}
    return f"{' '.join(left)} -> {' '.join(right)}", sizes, tuple(shape)


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_every_layout_is_a_bijection(case):
    layout, sizes, shape = case
    tensor = numbered(*shape)
    ours = to_jax(tensor, layout, sizes)
    assert sorted(ours.ravel()) == sorted(tensor.ravel())
    assert ours.shape == rearranged_shape(shape, layout, sizes)
    back = to_torch(ours, layout, sizes)
    np.testing.assert_array_equal(back, tensor)
    assert back.flags.c_contiguous


@pytest.mark.parametrize(
    ("layout", "shape", "expect"),
    [
        ("(n h) d -> d n h", (6, 5), lambda x: x.reshape(2, 3, 5).transpose(2, 0, 1)),
        ("d (n h) -> n h d", (5, 6), lambda x: x.reshape(5, 2, 3).transpose(1, 2, 0)),
        ("o i y x -> y x i o", (4, 3, 2, 2), lambda x: x.transpose(2, 3, 1, 0)),
        ("o i 1 1 -> i o", (4, 3, 1, 1), lambda x: x[:, :, 0, 0].T),
        ("(n h) -> n h", (6,), lambda x: x.reshape(2, 3)),
        ("", (4, 3), lambda x: x),
    ],
)
def test_layouts_by_hand(layout, shape, expect):
    tensor, sizes = numbered(*shape), {"n": 2, "h": 3}
    ours = to_jax(tensor, layout, sizes)
    np.testing.assert_array_equal(ours, expect(tensor))
    np.testing.assert_array_equal(to_torch(ours, layout, sizes), tensor)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, "bfloat16"])
def test_bytes_survive_in_any_dtype(dtype):
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensor = numbered(6, 5).astype(dtype)
    back = to_torch(to_jax(tensor, "(n h) d -> d n h", {"n": 2}), "(n h) d -> d n h", {})
    assert back.dtype == dtype and back.tobytes() == tensor.tobytes()


SIZES = {"n": 2, "h": 3}
RULES = (
    Rule("model.{i}.q.weight", "layers.q.kernel", "(n h) d -> d n h"),
    Rule("model.{i}.{p}norm.weight", "layers.{p}norm.scale"),
    Rule("down.{n}.conv.{m}.weight", "down_{n}.conv_{m}.kernel", "o i -> i o"),
    Rule("head.weight", "head.kernel", "v d -> d v"),
    Rule("old_head.weight", "head.kernel", "v d -> d v"),
)
LEAVES = {
    "layers.q.kernel": leaf(3, 5, 2, 3, stacked=True),
    "layers.pre.norm.scale": leaf(3, 5, stacked=True),
    "down_0.conv_1.kernel": leaf(4, 7),
    "down_11.conv_1.kernel": leaf(4, 7),
    "head.kernel": leaf(5, 8),
}
SHAPES = {
    **{f"model.{i}.q.weight": (6, 5) for i in (2, 0, 1)},
    **{f"model.{i}.pre.norm.weight": (5,) for i in range(3)},
    "down.0.conv.1.weight": (7, 4),
    "down.11.conv.1.weight": (7, 4),
    "head.weight": (8, 5),
}


def changed(drop=(), **more):
    more = {key.replace("__", "."): shape for key, shape in more.items()}
    return {k: s for k, s in SHAPES.items() if k not in drop} | more


def test_plan_stacks_by_layer_index_and_fills_placeholders():
    entries = {e.path: e for e in plan(RULES, LEAVES, SHAPES, SIZES)}
    assert entries.keys() == LEAVES.keys()
    assert entries["layers.q.kernel"] == Entry(
        "layers.q.kernel",
        ("model.0.q.weight", "model.1.q.weight", "model.2.q.weight"),
        "(n h) d -> d n h",
        True,
    )
    assert entries["layers.pre.norm.scale"].keys[2] == "model.2.pre.norm.weight"
    assert entries["down_11.conv_1.kernel"].keys == ("down.11.conv.1.weight",)


def test_plan_agrees_with_expected():
    assert plan(RULES, LEAVES, SHAPES, SIZES) == expected(RULES, LEAVES)


def test_the_first_of_two_spellings_names_an_export_and_the_files_own_a_round_trip():
    assert expected(RULES, LEAVES)[-1].keys == ("head.weight",)
    old = changed(drop=["head.weight"], old_head__weight=(8, 5))
    assert plan(RULES, LEAVES, old, SIZES)[-1].keys == ("old_head.weight",)


def test_all_offenders_are_in_one_error():
    rules = (*RULES, Rule("{p}.q.weight", "layers.q.kernel"))
    shapes = changed(
        drop=["model.1.pre.norm.weight", "down.0.conv.1.weight"],
        stray=(1,),
        head__weight=(9, 5),
        model__0__q__weight=(6, 5),
    )
    with pytest.raises(UserError) as caught:
        plan(rules, LEAVES, shapes, SIZES, where="folder X")
    text = str(caught.value)
    assert text.startswith("folder X does not fit the model: ") and "\n" not in text
    for part in (
        "unexpected tensor stray",
        "ambiguous tensor model.0.q.weight",
        "missing tensor model.1.pre.norm.weight",
        "missing tensor down.0.conv.1.weight",
        "tensor head.weight (9, 5) gives (5, 9), but the model has (5, 8)",
    ):
        assert part in text


def test_a_tensor_that_does_not_split_is_named_with_its_shape():
    with pytest.raises(UserError, match=r"model\.1\.q\.weight has shape \(7, 5\): 7 does not"):
        plan(RULES, LEAVES, changed(model__1__q__weight=(7, 5)), SIZES)
    with pytest.raises(UserError, match=r"model\.1\.q\.weight has shape \(6,\): 2 dims"):
        plan(RULES, LEAVES, changed(model__1__q__weight=(6,)), SIZES)


def test_a_layer_beyond_the_stack_is_unexpected():
    shapes = changed(model__3__q__weight=(6, 5))
    with pytest.raises(UserError, match=r"unexpected tensor model\.3\.q\.weight"):
        plan(RULES, LEAVES, shapes, SIZES)


def test_a_rule_may_stack_some_layers_alone():
    """Blocks of two shapes, as of SD 3.5: each kind has a stack of its own."""
    rules = (
        Rule("model.{i}.{p}.weight", "wide.{p}.kernel", "", range(1, 3)),
        Rule("model.{i}.{p}.weight", "last.{p}.kernel", "", range(3, 4)),
        Rule("model.{i}.{p}.weight", "first.{p}.kernel", "", range(1)),
    )
    leaves = {f"{name}.q.kernel": leaf(1, 4, stacked=True) for name in ("first", "last")}
    leaves |= {"wide.q.kernel": leaf(2, 5, stacked=True)}
    shapes = {f"model.{i}.q.weight": (5,) if i in (1, 2) else (4,) for i in (3, 1, 0, 2)}
    entries = {entry.path: entry.keys for entry in plan(rules, leaves, shapes, {})}
    assert entries["wide.q.kernel"] == ("model.1.q.weight", "model.2.q.weight")
    assert entries["first.q.kernel"] == ("model.0.q.weight",)
    assert entries["last.q.kernel"] == ("model.3.q.weight",)
    assert plan(rules, leaves, shapes, {}) == expected(rules, leaves)
    with pytest.raises(UserError, match=r"unexpected tensor model\.4\.q\.weight"):
        plan(rules, leaves, shapes | {"model.4.q.weight": (4,)}, {})
    del shapes["model.2.q.weight"]
    with pytest.raises(UserError, match=r"missing tensor model\.2\.q\.weight"):
        plan(rules, leaves, shapes, {})


def test_experts_are_stacked_on_the_second_axis():
    rules = (
        Rule("model.{i}.experts.{e}.w.weight", "layers.experts.w.kernel", "o i -> i o"),
        Rule("model.{i}.{p}.weight", "layers.{p}.kernel"),
    )
    leaves = {"layers.experts.w.kernel": leaf(2, 3, 4, 5, stacked=True)}
    pairs = [(i, e) for i in range(2) for e in range(3)]
    shapes = {f"model.{i}.experts.{e}.w.weight": (5, 4) for i, e in reversed(pairs)}
    (entry,) = plan(rules, leaves, shapes, {})
    assert entry.keys == tuple(f"model.{i}.experts.{e}.w.weight" for i, e in pairs)
    assert [entry.place(number) for number in range(6)] == pairs
    assert entry.one((2, 3, 4, 5)) == (4, 5)
    assert [entry] == expected(rules, leaves)
    with pytest.raises(UserError, match=r"unexpected tensor model\.1\.experts\.3\.w\.weight"):
        plan(rules, leaves, shapes | {"model.1.experts.3.w.weight": (5, 4)}, {})
    del shapes["model.1.experts.0.w.weight"]
    with pytest.raises(UserError, match=r"missing tensor model\.1\.experts\.0\.w\.weight"):
        plan(rules, leaves, shapes, {})


def test_a_parameter_with_two_sources_is_an_error():
    """Old and new spelling in one file: which one is right, nobody knows."""
    with pytest.raises(UserError, match=r"head\.weight and old_head\.weight"):
        plan(RULES, LEAVES, changed(old_head__weight=(8, 5)), SIZES)
    zero = changed(**{"model__00__q__weight": (6, 5)})
    with pytest.raises(UserError, match=r"model\.0\.q\.weight and model\.00\.q\.weight"):
        plan(RULES, LEAVES, zero, SIZES)


def test_a_parameter_without_a_rule_is_named():
    extra = {**LEAVES, "tail.kernel": leaf(2, 2)}
    with pytest.raises(UserError, match=r"parameter tail\.kernel has no rule"):
        plan(RULES, extra, SHAPES, SIZES)


def test_a_long_list_is_cut_and_counted():
    stray = {f"stray.{i}": (1,) for i in range(20)}
    with pytest.raises(UserError, match=r"stray\.11; and 8 more$"):
        plan(RULES, LEAVES, {**SHAPES, **stray}, SIZES)


def test_ignored_tensors_must_match_whole():
    shapes = changed(rotary__inv_freq=(3,), rotary__inv_freq2=(3,))
    with pytest.raises(UserError, match=r"unexpected tensor rotary\.inv_freq2$"):
        plan(RULES, LEAVES, shapes, SIZES, ignore=(r"rotary\.inv_freq",))


def test_a_repeated_placeholder_must_repeat():
    rules = (Rule("a.{n}.b.{n}.weight", "c.{n}"),)
    leaves = {"c.1": leaf(2)}
    assert plan(rules, leaves, {"a.1.b.1.weight": (2,)}, {})[0].keys == ("a.1.b.1.weight",)
    with pytest.raises(UserError, match=r"unexpected tensor a\.1\.b\.2\.weight; missing"):
        plan(rules, leaves, {"a.1.b.2.weight": (2,)}, {})
