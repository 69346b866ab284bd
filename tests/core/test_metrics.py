"""The record of a run survives kills and resumes; the progress line suits where it is shown."""

import io
import json
import struct
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxft.core import metrics
from jaxft.core.metrics import MetricWriter, Throughput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every TensorBoard scalar; tag None is a purge of later steps."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(event.step, value.tag, value) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append((event.step, None, None))
    return found


def test_records_are_plain_json_with_null_for_what_is_not_finite(tmp_path):
    with MetricWriter(tmp_path, 10, 0) as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "count": np.int64(3), "note": "a"})
        writer.write(2, {"loss": float("nan"), "grad_norm": jnp.inf, "half": jnp.bfloat16(0.5)})
        writer.write_eval(2, {"loss": 1.25})
        lines = records(tmp_path)  # flushed before the writer is closed
    assert lines == [
        {"step": 1, "loss": 2.5, "count": 3, "note": "a"},
        {"step": 2, "loss": None, "grad_norm": None, "half": 0.5},
        {"step": 2, "eval_loss": 1.25},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 3', "\n", '{"step": 3}'])
def test_s7_resume_drops_a_torn_line_and_later_steps(tmp_path, torn):
    whole = "".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in (1, 2, 3, 4, 5))
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    with MetricWriter(tmp_path, 10, 3) as writer:
        writer.write(4, {"loss": 0.0})
    steps = [record["step"] for record in records(tmp_path)]
    assert steps == [1, 2, 3, *([3] if torn == '{"step": 3}' else []), 4]


def test_s7_a_torn_utf8_letter_is_dropped_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "t": "\xc3')
    with MetricWriter(tmp_path, 10, 5) as writer:
        writer.write(6, {})
    assert records(tmp_path) == [{"step": 1}, {"step": 6}]


def test_a_run_from_the_start_drops_what_an_earlier_run_left(tmp_path):
    for loss in (1.0, 2.0):
        with MetricWriter(tmp_path, 10) as writer:
            writer.write(1, {"loss": loss})
    assert records(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_tensorboard_has_finite_scalars_and_images(tmp_path):
    with MetricWriter(tmp_path, 10, 6) as writer:
        writer.write(7, {"loss": 2.5, "bad": float("nan"), "name": "x"})
        writer.write_eval(7, {"loss": 1.5})
        writer.image(7, "sample", np.zeros((4, 6, 3), np.uint8))
    found = events(tmp_path)
    scalars = {tag: v.simple_value for _, tag, v in found if tag and v.HasField("simple_value")}
    assert scalars == {"train/loss": 2.5, "eval/loss": 1.5}
    assert {step for step, tag, _ in found if tag} == {7}
    (image,) = [v.image for _, tag, v in found if tag and v.HasField("image")]
    assert (image.height, image.width) == (4, 6)
    assert (7, None, None) in found  # the purge of what an earlier process wrote after step 6


def test_only_the_primary_process_writes_and_prints(tmp_path, capsys):
    with MetricWriter(tmp_path / "run", 10, 0, primary=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_eval(1, {"loss": 1.0})
        writer.note("hello")
        writer.image(1, "sample", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_record_is_a_plain_line(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 150.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with MetricWriter(tmp_path, 1000) as writer:
        writer.write(10, {"loss": 2.34567, "tokens_per_s": 12345.0, "mfu": 0.4123})
        writer.write_eval(10, {"loss": 1.5, "images": 8})
        rates = {"images_per_s": 3.25, "data_wait_share": 0.004, "gflops_per_s": 5.6e4}
        writer.write(20, {"loss": float("nan")} | rates)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "step 10/1000 | loss 2.346 | 12.3k tokens/s | MFU 41.2%",
        "eval at step 10 | loss 1.5 | images 8",
        "step 20/1000 | loss not finite | 3.25 images/s | 56k GFLOP/s | data wait 0.4% | ETA 1h21m",
    ]
    assert "\x1b" not in out and "\r" not in out


def test_a_record_can_be_kept_without_its_line(tmp_path, capsys, monkeypatch):
    with MetricWriter(tmp_path, 10) as writer:
        writer.write(1, {"loss": 1.0}, shown=False)
    assert capsys.readouterr().out == ""
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}]
    monkeypatch.setattr(sys, "stdout", Terminal())
    with MetricWriter(tmp_path, 10, 1) as writer:
        writer.write(2, {"loss": 1.0}, shown=False)
        assert "step 2/10" in sys.stdout.getvalue()


def test_on_a_terminal_one_line_is_redrawn(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "60")
    with MetricWriter(tmp_path, 20) as writer:
        writer.write(5, {"loss": 2.0, "tokens_per_s": 123456.0, "data_wait_share": 0.25})
        writer.write(10, {"loss": 1.0})
        writer.write_eval(10, {"loss": 1.5})
    shown, *rest = screen.getvalue().split("\n")
    first, second = [line.rstrip() for line in shown.split("\r") if line.strip()][:2]
    assert first.startswith("[#####...............] step 5/20 | loss 2 | 123k")
    assert second.startswith("[##########..........] step 10/20 | ETA 0m00s | loss 1")
    assert all(len(line) < 60 for line in screen.getvalue().replace("\r", "\n").split("\n"))
    assert shown.split("\r")[-1] == "eval at step 10 | loss 1.5"
    assert rest[0].strip("\r").startswith("[##########..........] step 10/20")
    assert "\x1b" not in screen.getvalue() and screen.getvalue().endswith("\n")


def test_a_narrow_terminal_has_the_time_left_and_whole_parts(tmp_path, monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "72")
    with MetricWriter(tmp_path, 20) as writer:
        writer.write(5, {"loss": 2.0})
        writer.write(10, {"loss": 1.0, "tokens_per_s": 123456.0, "gflops_per_s": 2.0})
    shown = screen.getvalue().rstrip("\n").split("\r")[-1].rstrip()
    assert shown == "[##########..........] step 10/20 | ETA 0m20s | loss 1 | 123k tokens/s"


def test_a_shorter_line_covers_the_longer_one(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with MetricWriter(tmp_path, 20) as writer:
        writer.write(1, {"loss": 1.23456, "tokens_per_s": 1e6})
        longer = len(screen.getvalue().split("\r")[-1])
        writer.note("hello")
    blank = screen.getvalue().split("\r")[2]
    assert blank == " " * longer


def test_throughput_rates():
    gpu = Throughput("NVIDIA H100 80GB HBM3", 8).rates(4000, 2.0, 0.5, 8 * 989e12)
    assert gpu == {"tokens_per_s": 2000.0, "data_wait_share": 0.25, "mfu": 0.5}
    cpu = Throughput("cpu", 8, unit="images").rates(10, 2.0, flops=4e9)
    assert cpu == {"images_per_s": 5.0, "data_wait_share": 0.0, "gflops_per_s": 2.0}
    assert "mfu" not in Throughput("NVIDIA H200", 1).rates(1, 1.0)


def test_table():
    rows = [("loss", 2.345678, 1.0), ("tokens", 12, None)]
    assert metrics.table(rows, ("metric", "before", "after")) == (
        "metric  before       after\n"
        "------  ------  ----------\n"
        "loss     2.346           1\n"
        "tokens      12  not finite"
    )
