"""The tables, compared with the names of the gguf package. Families are in tests/tasks/llm/gguf."""

import gguf
import pytest

from jaxft.weights.files.gguf_architectures import GGUF_ARCHITECTURES

NAMES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
# The package's converter stacks experts under these keys, and gives the others their parts.
RENAMED = {
    "block_sparse_moe.experts.{e}.w": "feed_forward.experts.w",
    "mlp.experts.{e}.": "mlp.experts.",
    "self_attn.sinks": "self_attn.sinks.weight",
}


def ids(entry):
    return entry.class_name


@pytest.mark.parametrize("entry", GGUF_ARCHITECTURES, ids=ids)
def test_names_are_those_of_the_gguf_package(entry):
    names = gguf.get_tensor_name_map(NAMES[entry.name], 12)
    for line in entry.tensors:
        key = line.key
        for ours, theirs in RENAMED.items():
            key = key.replace(ours, theirs)
        key = key.replace("{i}", "11").replace("model.layers.11.feed", "layers.11.feed")
        if entry.name == "gpt-oss" and "experts.gate_up_proj" in key:
            assert line.part in (0, 1) and (("up" in line.name) == bool(line.part))
            key = key.replace("gate_up_proj", ("gate_proj", "up_proj")[line.part])
        end = line.name.rpartition(".")[2]
        key = key.removesuffix("_bias").removesuffix(f".{end}") + f".{end}"
        wanted = line.name.replace("{i}", "11")
        assert names.get_name(key, try_suffixes=(".weight", ".bias")) == wanted, line


@pytest.mark.parametrize("entry", GGUF_ARCHITECTURES, ids=ids)
def test_metadata_have_names_that_the_gguf_package_knows(entry):
    known = {
        value
        for group in vars(gguf.Keys).values()
        for value in getattr(group, "__dict__", {}).values()
        if isinstance(value, str)
    }
    for line in entry.keys:
        assert "{arch}." + line.name in known, line.name
    assert not entry.marker or "{arch}." + entry.marker in known


@pytest.mark.parametrize("entry", GGUF_ARCHITECTURES, ids=ids)
def test_a_tensor_has_one_line_and_a_key_finds_it_again(entry):
    names = [line.name for line in entry.tensors]
    assert len(set(names)) == len(names)
    for line in entry.tensors:
        key = line.key.replace("{i}", "7").replace("{e}", "3")
        place = 3 if "{e}" in line.key else None
        assert (line.name.replace("{i}", "7"), line, place) in list(entry.placed(key))
        found, own = entry.lines(line.name.replace("{i}", "7"))
        assert found == line and own == line.key.replace("{i}", "7")
        assert not list(entry.placed(f"x.{key}"))
    for other in ("model.layers.1.self_attn.rotary_emb.inv_freq", "score.weight"):
        assert not list(entry.placed(other))
    assert entry.lines("blk.1.attn_gate.weight") == (None, "")
