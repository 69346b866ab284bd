"""A push of an export: what a hub on this machine receives, and each refusal before training."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.runs.folders import push
from jaxft.runs.folders.push import check_push

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that an upload of small files uses."""

    made, files, refuse = [], {}, False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self.answer({"error": "this name belongs to somebody else"}, 403)
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/words"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            way = {"uploadMode": "regular", "shouldIgnore": False}
            kept = [{"path": one["path"], **way} for one in json.loads(body)["files"]]
            self.answer({"files": kept})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            place = f"http://{self.headers['Host']}/me/words/commit/0"
            self.answer({"commitUrl": place, "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        self.answer({"error": self.path}, 404)

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.made, Hub.files, Hub.refuse = [], {}, False
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_export_goes_to_a_private_repository(hub, make_folder, make_flags, tmp_path):
    work = tmp_path / "run"
    changes = {"total": "1_steps", "lora.rank": 0, "data.eval": ""}
    flags = make_flags(make_folder(tied=True), changes)
    assert train.main([*CONFIG, "--workdir", str(work), *flags]) == 0
    command = [sys.executable, "-m", "jaxft.export", "--workdir", str(work), "--overwrite"]
    command += ["--config.export.push=me/words"]
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    shown = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert f"pushed {work / 'export'} to me/words" in shown.stdout
    assert [(one["name"], one.get("visibility")) for one in Hub.made] == [("words", "private")]
    written = {p.name: p.read_bytes() for p in (work / "export").iterdir() if p.name[0] != "."}
    assert Hub.files == written and "model.safetensors" in written
    Hub.refuse = True
    shown = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr
    assert "the export is in" in shown.stderr and "export.push=me/words failed (" in shown.stderr
    assert (work / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("me/my model", "merged", r"export.push='me/my model' is no name of a repository"),
        ("a/b/c", "merged", r"export.push='a/b/c' is no name"),
        ("me/words", "none", "export.push needs an export"),
        ("me/words", "merged", r"needs an account of the hub; run `hf auth login`"),
    ],
)
def test_mistakes(monkeypatch, name, kind, error):
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(UserError, match=error):
        check_push(name, kind)
    check_push("", kind)
