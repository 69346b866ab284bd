"""Sets of a hub on this machine: whole splits, first rows alone, and runs that go on without it."""

import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records
from tests.interrupted import kill_after, start, timeless

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]
SHA = "5" * 40
CARD = """---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: "main/train-*"}, {split: held_out, path: few.parquet}]
- config_name: few
  data_files: few.parquet
---
"""


def dot(colour):
    """The bytes of a PNG."""
    Image.new("RGB", (4, 4), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PICTURES = [dot("red"), dot("blue")]


def inside(files, folder):
    """Entries of a folder of the set: its files, and the folders in it."""
    below = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    entries = [
        {"type": "file", "oid": "1" * 40, "size": len(files[folder + name]), "path": folder + name}
        for name in below
        if "/" not in name
    ]
    folders = dict.fromkeys(name.partition("/")[0] for name in below if "/" in name)
    kind = {"type": "directory", "oid": "2" * 40, "size": 0}
    return entries + [{**kind, "path": folder + name} for name in folders]


def answer(sets, path):
    """(status, headers, body) of a request to a hub with these sets of files."""
    kind, parts = {"Content-Type": "application/json"}, path.partition("?")[0].strip("/").split("/")
    match parts:
        case ["api", "datasets", owner, name, "tree", _, *folder]:
            found = inside(sets[f"{owner}/{name}"], "".join(f"{part}/" for part in folder))
            return 200, kind, json.dumps(found).encode()
        case ["api", "datasets", owner, name, *_] if f"{owner}/{name}" in sets:
            names = [{"rfilename": file} for file in sets[f"{owner}/{name}"]]
            whole = {"id": f"{owner}/{name}", "sha": SHA, "siblings": names, "tags": []}
            return 200, kind, json.dumps(whole).encode()
        case ["datasets", owner, name, "resolve", _, *file]:
            whole = sets.get(f"{owner}/{name}", {}).get("/".join(file))
            if whole is not None:
                return 200, {"ETag": f'"{sha256(whole).hexdigest()[:40]}"'}, whole
    known = any(name in path for name in sets)
    return 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}, b""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with two sets. `hub.sent` counts bytes by file."""
    rng = np.random.default_rng(0)
    files = {"README.md": CARD.encode()}
    for name, first, rows in (
        ("main/train-00", 0, 1000),
        ("main/train-01", 1000, 1000),
        ("few", 9000, 3),
    ):
        notes = [rng.bytes(10_000).hex() for _ in range(rows)]  # nothing for a compression
        table = pa.table(
            {
                "prompt": [f"{i}: a bird" for i in range(first, first + rows)],
                "completion": [f" sings {i * 7919 % 10007}" for i in range(first, first + rows)],
                "note": notes,
            }
        )
        pq.write_table(table, sink := io.BytesIO(), row_group_size=50)
        files[f"{name}.parquet"] = sink.getvalue()
    lines = b'{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n'
    cells = [{"bytes": one, "path": None} for one in PICTURES]
    table = pa.table({"image": cells, "text": ["a red dot", "a blue dot"]})
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    about = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), sink := io.BytesIO())
    sets = {
        "birds/songs": files,
        "birds/lines": {"train.jsonl": lines},
        "birds/pictures": {"data/train-00000-of-00001.parquet": sink.getvalue()},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = answer(sets, self.path)
            if asked := self.headers.get("Range"):
                begin, end = asked.removeprefix("bytes=").split("-")
                place = slice(int(begin), int(end or len(body) - 1) + 1)
                headers["Content-Range"] = f"bytes {begin}-{place.stop - 1}/{len(body)}"
                status, body = 206, body[place]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("X-Repo-Commit", SHA)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                server.sent[Path(self.path).name] += len(body)

        do_HEAD = do_GET

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent, server.files = Counter(), files
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


OPEN = """
import json, sys
from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_images, open_records
for spec in sys.argv[1:]:
    try:
        if "pictures" in spec:
            found = open_images(spec).source
            told = [[found.caption(i), found.content(i).hex()] for i in range(len(found))]
            print("told", json.dumps(told))
            continue
        found = open_records(spec)
        rows = [found[i] for i in (0, len(found) - 1)]
        told = [len(found), *({k: v for k, v in row.items() if k != "note"} for row in rows)]
    except UserError as error:
        told = str(error)
    print("told", json.dumps(told))
"""


def opened(*specs):
    """What a process that starts now reads: the hub's address is fixed at its import."""
    command = [sys.executable, "-c", OPEN, *specs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("told ")]
    return [json.loads(line.removeprefix("told ")) for line in lines]


def row(i):
    return {"prompt": f"{i}: a bird", "completion": f" sings {i * 7919 % 10007}"}


def test_splits_and_subsets(hub):
    whole, held, few, revision, lines = opened(
        "hf:birds/songs",
        "hf:birds/songs:held_out",
        "hf:birds/songs:few/train",
        f"hf:birds/songs:main/held_out@{SHA}",
        "hf:birds/lines",
    )
    assert whole == [2000, row(0), row(1999)]
    assert held == few == revision == [3, row(9000), row(9002)]
    assert lines == [3, {"text": "one"}, {"text": "three"}]


def test_pictures(hub):
    whole, first = opened("hf:birds/pictures", "hf:birds/pictures:train[:1]")
    assert whole == [["a red dot", PICTURES[0].hex()], ["a blue dot", PICTURES[1].hex()]]
    assert first == whole[:1]


def test_first_rows_are_streamed_and_kept(hub):
    assert opened("hf:birds/songs:train[:250]", "hf:birds/lines:train[:2]") == [
        [250, row(0), row(249)],
        [2, {"text": "one"}, {"text": "two"}],
    ]
    assert not hub.sent["train-01.parquet"], "nothing after the rows is read"
    streamed = dict(hub.sent)
    hub.files["main/train-00.parquet"] = b"another state of the set"
    assert opened("hf:birds/songs:train[:250]") == [[250, row(0), row(249)]]
    assert hub.sent["train-00.parquet"] == streamed["train-00.parquet"], "they are kept"
    assert not list(Path(os.environ["HF_HOME"]).rglob("*.partial"))


def test_what_the_hub_does_not_give_is_told_in_one_line(hub):
    unknown, split, subset, empty = opened(
        "hf:birds/none",
        "hf:birds/songs:valid",
        "hf:birds/songs:x/train",
        "hf:birds/songs:train[:0]",
    )
    for told, words in (
        (unknown, "the Hugging Face hub did not give it: DatasetNotFoundError"),
        (split, "Unknown split \"valid\". Should be one of ['train', 'held_out']"),
        (subset, "BuilderConfig 'x' not found. Available: ['main', 'few']"),
        (empty, "expected .parquet or .arrow files, or a set of the Hugging Face hub"),
    ):
        assert words in told and "\n" not in told and "hf:OWNER/NAME:SPLIT" in told


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'no table at birds/songs .*pip install "jaxft\[data\]"'):
        open_records("hf:birds/songs")


def test_a_killed_run_on_first_rows_goes_on_without_the_hub(hub, make_folder, make_flags, tmp_path):
    """The rows are kept, so that a resumed run reads the same ones."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "what", "completion": " a fish"}\n' * 9)
    changes = {
        "data.train": f"0.75*hf:birds/songs:train[:40] + 0.25*{tmp_path}/own.jsonl",
        "data.eval": "hf:birds/songs:held_out",
        "total": "6_steps",
        "every.save": "2_steps",
    }
    arguments = [*CONFIG, *make_flags(make_folder(tied=True), changes)]
    assert start([*arguments, "--workdir", str(tmp_path / "whole")]).wait() == 0
    process = start([*arguments, "--workdir", str(tmp_path / "broken")])
    assert kill_after(process, tmp_path / "broken", 3), "no process was killed in time"
    hub.shutdown()
    hub.server_close()
    assert start([*arguments, "--workdir", str(tmp_path / "broken")]).wait() == 0
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")
    first, again = (
        tmp_path / name / "export" / "model.safetensors" for name in ("whole", "broken")
    )
    assert first.read_bytes() == again.read_bytes()
