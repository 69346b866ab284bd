"""Array cache: every bit comes back, nothing stale does, and a killed writer loses no entry."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data import cache as module
from jaxft.data.cache import ArrayCache, fill, missing

ROOT = Path(__file__).resolve().parents[2]


def arrays(seed, size=5):
    rng = np.random.default_rng(seed)
    return {
        "codes": rng.integers(0, 60000, (size, 2)).astype(np.uint16),
        "moments": rng.standard_normal((2, size)).astype(np.float32),
        "text": rng.standard_normal(size).astype(ml_dtypes.bfloat16),
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        assert left[name].tobytes() == right[name].tobytes()


def test_arrays_come_back_bit_for_bit_before_and_after_reopening(tmp_path):
    odd = {"scalar": np.float32(3).reshape(()), "none": np.zeros((0, 3), np.int8)}
    with_bits = {"b": np.asarray([True, False]), "f": np.asarray([1.5], np.float16)}
    cache = ArrayCache(tmp_path, "vae 1")
    for i in range(5):
        cache.put(f"k{i}", arrays(i, size=i + 1))
    cache.put("odd", odd)
    cache.put("nothing", {"none": np.zeros((0, 3), np.float32)})
    cache.put("bits", with_bits)
    for store in (cache, None):
        if store is None:
            cache.flush()
            store = ArrayCache(tmp_path, "vae 1")
        assert len(store) == 8 and "k4" in store and "k5" not in store
        for i in range(5):
            assert_same(store.get(f"k{i}"), arrays(i, size=i + 1))
        assert_same(store.get("odd"), odd)
        assert store.get("nothing")["none"].shape == (0, 3)
        assert_same(store.get("bits"), with_bits)
        with pytest.raises(KeyError):
            store.get("k5")


def test_a_key_is_stored_once_and_reading_gives_copies(tmp_path):
    cache = ArrayCache(tmp_path, "a")
    cache.put("k", arrays(0))
    cache.put("k", arrays(1))
    cache.get("k")["moments"][:] = 0
    assert_same(cache.get("k"), arrays(0))


def test_namespaces_in_one_folder_never_mix(tmp_path):
    names = [
        "vae abc float32",
        "vae abc bfloat16",
        "vae/abc float32",
        "x" * 60 + "1",
        "x" * 60 + "2",
    ]
    caches = [ArrayCache(tmp_path, name) for name in names]
    for i, cache in enumerate(caches):
        assert len(cache) == 0
        cache.put("k", arrays(i))
        cache.flush()
    for i, name in enumerate(names):
        assert_same(ArrayCache(tmp_path, name).get("k"), arrays(i))


def test_hosts_read_each_others_shards_after_refresh(tmp_path):
    first, second = ArrayCache(tmp_path, "n", host=0), ArrayCache(tmp_path, "n", host=1)
    first.put("a", arrays(1))
    second.put("b", arrays(2))
    first.flush()
    second.flush()
    assert "b" not in first
    first.refresh()
    second.refresh()
    for cache in (first, second, ArrayCache(tmp_path, "n", host=7)):
        assert_same(cache.get("a"), arrays(1))
        assert_same(cache.get("b"), arrays(2))
    first.put("c", arrays(3))
    first.flush()
    second.refresh()
    assert_same(second.get("c"), arrays(3))


def test_unflushed_entries_do_not_count_for_others(tmp_path):
    cache = ArrayCache(tmp_path, "n")
    cache.put("a", arrays(1))
    assert len(ArrayCache(tmp_path, "n")) == 0
    cache.flush()
    assert len(ArrayCache(tmp_path, "n")) == 1


def test_two_processes_of_one_host_write_to_shards_of_their_own(tmp_path):
    first, second = ArrayCache(tmp_path, "n"), ArrayCache(tmp_path, "n")
    for i in range(4):
        (first, second)[i % 2].put(f"k{i}", arrays(i))
        (first, second)[i % 2].flush()
    both = ArrayCache(tmp_path, "n")
    for i in range(4):
        assert_same(both.get(f"k{i}"), arrays(i))


def test_shards_roll_and_are_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE_SHARD_BYTES", 200)
    for run in range(3):
        cache = ArrayCache(tmp_path, "n")
        for i in range(run * 5, run * 5 + 5):
            cache.put(f"k{i}", arrays(i))  # 70 bytes each
        cache.close()
    sizes = [path.stat().st_size for path in sorted(cache.folder.glob("*.bin"))]
    assert max(sizes) <= 200 and sizes == [140] * 7 + [70]
    whole = ArrayCache(tmp_path, "n")
    for i in range(15):
        assert_same(whole.get(f"k{i}"), arrays(i))
    whole.put("large", arrays(0, size=100))  # larger than a shard may be: alone in its own
    assert_same(whole.get("large"), arrays(0, size=100))


@pytest.mark.parametrize("torn", ["index", "data", "both", "missing data", "garbage"])
def test_a_torn_tail_is_ignored_and_cut_off_by_the_next_writer(tmp_path, torn):
    cache = ArrayCache(tmp_path, "n")
    for i in range(3):
        cache.put(f"k{i}", arrays(i))
    cache.close()
    data, index = (next(cache.folder.glob(pattern)) for pattern in ("*.bin", "*.jsonl"))
    whole = index.read_bytes()
    if torn in ("index", "both"):
        index.write_bytes(whole[:-20])
    if torn in ("data", "both"):
        data.write_bytes(data.read_bytes() + b"left over")
    if torn == "missing data":
        data.write_bytes(data.read_bytes()[:-3])
    if torn == "garbage":
        index.write_bytes(whole + b'{"key": 3}\n{"key"')
    n = 3 if torn in ("data", "garbage") else 2
    again = ArrayCache(tmp_path, "n")
    assert len(again) == n
    for i in range(n, 5):
        again.put(f"k{i}", arrays(i))
    again.close()
    last = ArrayCache(tmp_path, "n")
    assert len(last) == 5
    for i in range(5):
        assert_same(last.get(f"k{i}"), arrays(i))
    assert [json.loads(line)["key"] for line in index.read_bytes().splitlines()] == [
        f"k{i}" for i in range(5)
    ]
    assert data.stat().st_size == 5 * 70


WRITER = """
import sys, numpy as np
from jaxft.data.cache import ArrayCache
cache = ArrayCache(sys.argv[1], "n")
for i in range(100000):
    cache.put(str(i), {"x": np.full(997, i, np.float32)})
    if i % 3 == 2:
        cache.flush()
        print(i, flush=True)
"""


def test_a_killed_writer_loses_only_what_it_had_not_flushed(tmp_path):
    known = -1
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE, cwd=ROOT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > known + 30:
                break
        time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        flushed = [int(line) for line in process.stdout]
        process.wait()
        cache = ArrayCache(tmp_path, "n")
        known = max([int(line), *flushed])
        assert len(cache) >= known + 1 and (len(cache)) % 3 == 0
        for i in range(len(cache)):
            assert (cache.get(str(i))["x"] == i).all()
        known = len(cache) - 1
    cache.put("last", arrays(9))
    cache.close()
    assert_same(ArrayCache(tmp_path, "n").get("last"), arrays(9))
    assert ArrayCache(tmp_path, "n").get(str(known))["x"][0] == known


def test_threads_read_and_write_together(tmp_path):
    cache = ArrayCache(tmp_path, "n")

    def work(i):
        cache.put(f"k{i}", arrays(i))
        assert_same(cache.get(f"k{i}"), arrays(i))
        if f"k{i // 2}" in cache:
            assert_same(cache.get(f"k{i // 2}"), arrays(i // 2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(300)))
    cache.close()
    assert len(ArrayCache(tmp_path, "n")) == 300


def test_damaged_data_and_nan_are_refused(tmp_path):
    cache = ArrayCache(tmp_path, "n")
    with pytest.raises(UserError, match=r"'m' of key1 is not finite"):
        cache.put("key1", {"m": np.asarray([1, np.nan], ml_dtypes.bfloat16)})
    cache.put("k", arrays(0))
    cache.close()
    path = next(cache.folder.glob("*.bin"))
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"host-00000-00000\.bin is damaged at byte 0: delete"):
        ArrayCache(tmp_path, "n").get("k")
    path.unlink()  # as the message says
    again = ArrayCache(tmp_path, "n")
    assert len(again) == 0
    again.put("k", arrays(2))
    again.close()
    assert_same(ArrayCache(tmp_path, "n").get("k"), arrays(2))


def test_a_cache_of_nothing_but_empty_arrays_reads(tmp_path):
    cache = ArrayCache(tmp_path, "n")
    cache.put("k", {"none": np.zeros(0, np.float32)})
    assert cache.get("k")["none"].shape == (0,)


BUCKETS = np.arange(9) % 2


class Numbers:
    """Example i is the number i; example 8 equals example 0."""

    def __init__(self):
        self.read = []

        self.keys = [f"key {index % 8}" for index in range(9)]

    def examples(self, indices):
        self.read += indices
        return [index % 8 for index in indices]


def test_fill_computes_what_is_missing_in_batches_of_one_bucket(tmp_path):
    cache, dataset = ArrayCache(tmp_path, "n"), Numbers()
    keys = dataset.keys
    seen = []

    def compute(examples):
        seen.append(examples)
        return [arrays(i) for i in examples]

    filling = fill(cache, dataset.examples, keys, compute, 3, bucket_of=BUCKETS)
    assert next(filling) == (3, 8)
    filling.close()  # stopped after a batch
    assert len(ArrayCache(tmp_path, "n")) == 3
    assert list(fill(cache, dataset.examples, keys, compute, 3, bucket_of=BUCKETS)) == [
        (3, 5),
        (4, 5),
        (5, 5),
    ]
    assert sorted(i for group in seen for i in group) == list(range(8))
    assert all(len({i % 2 for i in group}) == 1 and len(group) <= 3 for group in seen)
    for i, key in enumerate(keys):
        assert_same(cache.get(key), arrays(i % 8))
    dataset.read.clear()
    assert (
        list(fill(cache, dataset.examples, keys, compute, 3, bucket_of=BUCKETS)) == []
        and dataset.read == []
    )


def test_hosts_fill_disjoint_shares_that_cover_all(tmp_path):
    dataset = Numbers()
    keys = dataset.keys
    for host in range(3):
        cache = ArrayCache(tmp_path, "n", host)
        assert missing(cache, keys, host, 3) == list(range(host, 8 if host == 2 else 9, 3))
        list(
            fill(
                cache,
                dataset.examples,
                keys,
                lambda ids: [arrays(i) for i in ids],
                2,
                host=host,
                hosts=3,
            )
        )
        cache.close()
    whole = ArrayCache(tmp_path, "n")
    assert missing(whole, keys) == [] and len(whole) == 8


def test_a_disk_error_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the cache .*file.* Not a directory"):
        ArrayCache(tmp_path / "file", "n")
    cache = ArrayCache(tmp_path, "n")
    cache.folder.rmdir()
    with pytest.raises(UserError, match=r"cannot use the cache .* No such file"):
        cache.put("k", arrays(0))
