import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open
from transformers.utils.hub import get_checkpoint_shard_files

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded

RNG = np.random.default_rng(0)
ARRAYS = {
    "flag": np.array([True, False, True]),
    "w32": RNG.standard_normal((3, 5)).astype(np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "b.f16": RNG.standard_normal(7).astype(np.float16),
    "scalar": np.array(2.5, np.float32),
    "w16": RNG.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
    "ids": np.arange(-3, 3, dtype=np.int64),
    "step": np.array(7, np.int64),
    "strided": np.asfortranarray(RNG.standard_normal((4, 6)).astype(np.float32))[:, ::2],
}


def write(folder: Path, arrays: dict = ARRAYS, **sizes) -> list[Path]:
    infos = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    return write_sharded(folder, reversed(arrays.items()), infos, **sizes)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.shape, left.dtype, left.tobytes()) == (right.shape, right.dtype, right.tobytes())


def raw(header: str | bytes, data: bytes = b"\0" * 8) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def test_t29_one_file_is_bitwise_for_every_reader(tmp_path):
    (file,) = write(tmp_path)
    assert file.name == "model.safetensors" and len(list(tmp_path.iterdir())) == 1
    ours, theirs = TensorFiles.open(tmp_path), safetensors.torch.load_file(file)
    assert set(ours.keys()) == set(theirs) == set(ARRAYS)
    for key, array in ARRAYS.items():
        assert ours.info(key) == (array.shape, array.dtype)
        assert same(ours.read(key), array), key
        tensor = theirs[key]
        assert tuple(tensor.shape) == array.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), key
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_t29_every_tensor_is_aligned_to_its_width(tmp_path):
    content = write(tmp_path)[0].read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    for key, array in ARRAYS.items():
        offset = start + header[key]["data_offsets"][0]
        assert offset % array.itemsize == 0 and start % 8 == 0


def test_t29_shards_and_index(tmp_path):
    files = write(tmp_path, max_shard_bytes=100)
    count = len(files)
    assert count > 2
    assert [f.name for f in files] == [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    by_shard = {file.name: safetensors.numpy.load_file(file) for file in files}
    assert all(sum(a.nbytes for a in shard.values()) <= 100 for shard in by_shard.values())
    assert all(key in by_shard[name] for key, name in index["weight_map"].items())
    ours = TensorFiles.open(tmp_path)
    assert set(ours.keys()) == set(ARRAYS)
    assert all(same(ours.read(key), array) for key, array in ARRAYS.items())


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path):
    arrays = {name: np.full(size, 1.0, np.float32) for name, size in (("a", 2), ("b", 99))}
    assert len(write(tmp_path, arrays, max_shard_bytes=16)) == 2
    assert same(TensorFiles.open(tmp_path).read("b"), arrays["b"])


def test_diffusers_stem(tmp_path):
    infos = {"w": ((2,), np.dtype(np.float32))}
    write_sharded(tmp_path, [("w", np.ones(2, np.float32))], infos, stem="diffusion_pytorch_model")
    assert TensorFiles.open(tmp_path).keys() == ["w"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "never written: w"),
        ([("w", np.ones(3, np.float32))], "expected"),
        ([("w", np.ones(2, np.float16))], "expected"),
        ([("v", np.ones(2, np.float32))], "not announced"),
        ([("w", np.ones(2, np.float32))] * 2, "twice"),
    ],
)
def test_write_refuses_what_was_not_announced(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_sharded(tmp_path, tensors, {"w": ((2,), np.dtype(np.float32))})


GOOD = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
HOSTILE = {
    "empty": b"",
    "four bytes": b"\1\0\0\0",
    "size 2^63": struct.pack("<Q", 2**63) + b"{}",
    "size 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "size above the file": struct.pack("<Q", 8 * 10**9) + b"{}",
    "size zero": struct.pack("<Q", 0),
    "bad json": raw('{"w":'),
    "bad utf-8": raw(b'{"\xff":{' + GOOD.encode() + b"}}"),
    "deep nesting": raw("[" * 200_000),
    "list root": raw("[]"),
    "wrong dtype": raw('{"w":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}'),
    "missing field": raw('{"w":{"dtype":"F32","shape":[2]}}'),
    "negative": raw('{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'),
    "end before begin": raw('{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'),
    "overlap": raw(f'{{"w":{{{GOOD}}},"v":{{{GOOD}}}}}'),
    "hole": raw('{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
    "trailing bytes": raw(f'{{"w":{{{GOOD}}}}}', b"\0" * 9),
    "cut short": raw(f'{{"w":{{{GOOD}}}}}', b"\0" * 7),
    "wrong bytes": raw('{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'),
    "overflow": raw('{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}'),
    "zero times 2^62": raw(
        '{"w":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}', b""
    ),
    "duplicate key": raw(f'{{"w":{{{GOOD}}},"w":{{{GOOD}}}}}'),
    "duplicate field": raw(f'{{"w":{{"dtype":"I32",{GOOD}}}}}'),
    "non-string metadata": raw(f'{{"__metadata__":{{"a":1}},"w":{{{GOOD}}}}}'),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, case):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(UserError, match=r"model\.safetensors: ") as caught:
        TensorFiles.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE["git-lfs pointer"])
    with pytest.raises(UserError, match=r"a git-lfs pointer.*git lfs pull"):
        TensorFiles.open(tmp_path)


def test_the_hostile_template_itself_is_good(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw(f'{{"w":{{{GOOD}}}}}'))
    assert TensorFiles.open(tmp_path).read("w").tolist() == [0.0, 0.0]


def test_truncation_after_opening_is_noticed(tmp_path):
    (file,) = write(tmp_path)
    tensors = TensorFiles.open(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends inside"):
        list(map(tensors.read, tensors.keys()))


def edit_index(folder: Path, **weight_map) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w32": "../model-00001-of-00002.safetensors"}, "expected a file beside it"),
        ({"w32": "/etc/passwd"}, "expected a file beside it"),
        ({"w32": "a\\b.safetensors"}, "expected a file beside it"),
        ({"w32": 3}, "expected a file beside it"),
        ({"w32": ""}, "expected a file beside it"),
        ({"w32": "link.safetensors"}, "expected a file beside it"),
        ({"w32": "sub/link.safetensors"}, "expected a file beside it"),
        ({"w32": "model-00009-of-00009.safetensors"}, "missing shards model-00009.*download index"),
    ],
)
def test_an_index_names_files_of_its_own_folder_that_are_there(tmp_path, change, message):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    assert len(write(folder, max_shard_bytes=120)) == 2
    (tmp_path / "outside.safetensors").write_bytes(raw("{}", b""))
    for link in ("link.safetensors", "sub/link.safetensors"):
        (folder / link).symlink_to(tmp_path / "outside.safetensors")
    edit_index(folder, **change)
    with pytest.raises(UserError, match=message):
        TensorFiles.open(folder)


ODD = {
    "an entry for a tensor that no shard has": {"absent": "model-00001-of-00002.safetensors"},
    "no entry for a tensor of a shard": {"w32": None},
    "an entry with the wrong shard": {"w32": "model-00002-of-00002.safetensors"},
    "another wrong shard": {"w32": "model-00001-of-00002.safetensors"},
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("metadata", [None, {"total_size": 1}, {"total_size": "x"}])
def test_shards_are_read_as_transformers_reads_them_whatever_the_index_has_of_their_tensors(
    tmp_path, case, metadata
):
    write(tmp_path, max_shard_bytes=120)
    edit_index(tmp_path, **ODD[case])
    path = tmp_path / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": content["weight_map"], "metadata": metadata}))
    tensors = TensorFiles.open(tmp_path)
    assert set(tensors.keys()) == set(ARRAYS)
    assert all(same(tensors.read(key), ARRAYS[key]) for key in ARRAYS)
    if metadata:  # transformers wants some
        files, _ = get_checkpoint_shard_files(str(tmp_path), str(path))
        theirs = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
        assert set(theirs) == set(ARRAYS)


def test_shards_of_another_save_and_an_old_index(tmp_path):
    """The index decides between saves; a single file decides over an index."""
    first, _ = write(tmp_path, max_shard_bytes=120)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"not looked at")
    assert set(TensorFiles.open(tmp_path).keys()) == set(ARRAYS)
    single = {"w": np.ones(2, np.float32)}
    safetensors.numpy.save_file(single, tmp_path / "model.safetensors")
    assert list(TensorFiles.open(tmp_path).keys()) == ["w"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    assert set(TensorFiles.open(tmp_path).keys()) == set(ARRAYS)
    first.unlink()
    with pytest.raises(UserError, match=r"but there is model-00003-of-00003.*of another save"):
        TensorFiles.open(tmp_path)


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path):
    first, second = write(tmp_path, max_shard_bytes=120)
    content = safetensors.numpy.load_file(second)
    key, value = next(iter(safetensors.numpy.load_file(first).items()))
    safetensors.numpy.save_file({**content, key: value}, second)
    with pytest.raises(UserError, match="is also in"):
        TensorFiles.open([first, second])
    tensors = TensorFiles.open(tmp_path)
    assert set(tensors.keys()) == set(ARRAYS) and same(tensors.read(key), ARRAYS[key])
    for changed in (value[::-1] + 1, value.astype(np.complex64).real.astype(np.float64)):
        safetensors.numpy.save_file({**content, key: np.ascontiguousarray(changed)}, second)
        with pytest.raises(UserError, match=rf"{key}'? is also in model-00001.*with other values"):
            TensorFiles.open(tmp_path)


def test_shards_in_a_subfolder_and_an_index_by_its_path(tmp_path):
    files = write(tmp_path, max_shard_bytes=120)
    (tmp_path / "shards").mkdir()
    for file in files:
        file.rename(tmp_path / "shards" / file.name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"shards/model-'))
    for where in (tmp_path, index):
        tensors = TensorFiles.open(where)
        assert all(same(tensors.read(key), ARRAYS[key]) for key in ARRAYS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", r"consolidated\.safetensors, which has Mistral's own names"),
        ("model-00001-of-00002.safetensors", r"but shards \(model-00001.*download the index"),
        ("model.fp16.safetensors", r"but model\.fp16\.safetensors; give one .* by its path"),
    ],
)
def test_what_lies_there_instead_is_named(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"neither model\.safetensors nor .*{message}") as caught:
        TensorFiles.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_hub_cache_links_are_followed(tmp_path):
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(write(folder, max_shard_bytes=120)):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert set(TensorFiles.open(folder).keys()) == set(ARRAYS)


def test_pickles_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        TensorFiles.open(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights_only=True"):
        TensorFiles.open(tmp_path)
    with pytest.raises(UserError, match="pickle") as caught:
        TensorFiles.open(tmp_path / "pytorch_model.bin")
    assert "\n" not in str(caught.value)
