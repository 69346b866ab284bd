"""Parsers of foreign files, a sound file for each, and hypothesis strategies that damage it."""

import copy
import io
import json
import resource
import signal
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFWriter
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING

from jaxft.core.errors import UserError
from jaxft.data.sources.images.folders import open_folder
from jaxft.data.sources.images.tars import open_tars
from jaxft.data.sources.texts.json_files import JsonRecords
from jaxft.data.text.chat.records import is_chat, read_conversation
from jaxft.models import registry
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders.transformers import open_source

CASE_SECONDS = 20  # a case that takes longer is a hang
DECODERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "olmo2")
NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1, 10**30)
STRANGE = (
    *(None, True, False, *NUMBERS, 0.5, -0.0, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", "x", "../x", "/etc/passwd", "\0", "\ud800", "9" * 400, "F32", "{{ x }}", "<s>"),
    *([], [[]], [1], [None], ["x"], [{}], {}, {"a": 1}, {"type": "x"}, [[1, 2], [3]], "@deep@"),
)
DEEP = "[" * 40_000 + "]" * 40_000  # the text in the place of "@deep@"


class Parser(NamedTuple):
    """A sound file as bytes, the strategy of its damaged copies, and the call that reads one."""

    cases: st.SearchStrategy[bytes]
    read: Callable[[Path, bytes], Any]


# ---- damage ---------------------------------------------------------------------------------


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Change, insert, delete or repeat bytes, overwrite integers, or cut the end."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(("flip", "integer", "insert", "delete", "repeat", "cut")))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "integer":
            size = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
            content[at : at + size] = number.to_bytes(size, "little")
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 600))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 600))]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


@st.composite
def damaged_json(draw: st.DrawFn, sound: Any) -> bytes:
    """Replace, delete, rename or repeat values anywhere in a JSON value, or damage its bytes."""
    content = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(content))))
        kind = draw(st.sampled_from(("strange", "strange", "any", "delete", "rename", "wrap")))
        if kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(("x", "type", "", *holder)))] = holder.pop(key)
        elif kind == "wrap":
            holder[key] = [holder[key]] * draw(st.integers(1, 40))
        elif kind == "any":
            holder[key] = draw(st.integers() | st.floats() | st.text(max_size=30))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
        if not list(_places(content)):
            break
    text = json.dumps(content).replace('"@deep@"', DEEP).encode()
    return draw(damaged_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value below a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@st.composite
def damaged_header(draw: st.DrawFn, sound: bytes) -> bytes:
    """Damage the JSON header of a safetensors file, and give its length. Or damage its bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(sound))
    size = int.from_bytes(sound[:8], "little")
    header = draw(damaged_json(json.loads(sound[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + sound[8 + size :]


def damaged_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Return lines of JSON of which one is damaged."""
    sound = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return st.one_of(damaged_json(rows[0]).map(lambda line: line + b"\n" + sound),
                     damaged_bytes(sound))  # fmt: skip


# ---- parsers --------------------------------------------------------------------------------

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int8)}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello", "tool_calls": [{"name": "f", "arguments": {}}]},
]
CHATS = (
    {"messages": TALK, "tools": [{"type": "function"}], "chat_template_kwargs": {"a": 1}},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": TALK[:2], "completion": TALK[2:]},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
)


def read_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    tensors = TensorFiles.open(folder)
    for key in tensors.keys():  # noqa: SIM118 - no mapping
        tensors.read(key)


def read_index(folder: Path, content: bytes) -> None:
    for i in (1, 2):
        (folder / f"model-0000{i}-of-00002.safetensors").write_bytes(save(_shard(i)))
    (folder / "model.safetensors.index.json").write_bytes(content)
    TensorFiles.open(folder)


def _shard(i: int) -> dict[str, np.ndarray]:
    return {f"{name}{i}": tensor for name, tensor in TENSORS.items()}


def read_gguf(folder: Path, content: bytes) -> None:
    (folder / "model.gguf").write_bytes(content)
    made = GgufFile(folder / "model.gguf")
    config = made.config()
    registry.find(config, registry.find_family(config) or "", "model.gguf")
    made.side_files()
    for key in made.keys():  # noqa: SIM118 - no mapping
        made.read(key)


def read_config(folder: Path, content: bytes) -> None:
    file = folder / "config.json"
    file.write_bytes(content)
    config = open_source(str(folder), weights=False).config
    if family := registry.find_family(config):
        registry.find(config, family, str(file)).config(config, str(file))


def read_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
    tokenizer = load_tokenizer(folder)
    try:
        tokenizer.decode(
            tokenizer("Hello  World, aaaa 12345\n", add_special_tokens=True)["input_ids"]
        )
    except Exception as error:  # an encoding that fails is an error of the row that it encodes
        if "unk" not in str(error).lower():
            raise


def read_chat(folder: Path, content: bytes) -> None:
    (folder / "chat.jsonl").write_bytes(content)
    records = JsonRecords("jsonl:chat.jsonl", folder / "chat.jsonl")
    for i in range(len(records)):
        try:
            record = records[i]
            is_chat(record, ("prompt", "completion"))
            read_conversation(record, records.where(i))
        except UserError:
            continue


def read_metadata(folder: Path, content: bytes) -> None:
    for name in "ab":
        (folder / f"{name}.png").write_bytes(_png())
    (folder / "metadata.jsonl").write_bytes(content)
    _read_set(open_folder(f"folder:{folder}", folder, True)[0])


def read_tar(folder: Path, content: bytes) -> None:
    (folder / "set.tar").write_bytes(content)
    _read_set(open_tars("tar", str(folder / "set.tar"), True)[0])


def _read_set(source: Any) -> None:
    for i in range(len(source)):
        try:
            source.name(i), source.caption(i), source.content(i)
        except UserError:
            continue


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def _gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(f"{folder}/model.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<s>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes = {"token_embd": (4, 8), "output_norm": (8,)} | {
            f"blk.0.{name}": (8, 8) for name in names
        }
        shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(f"{folder}/model.gguf").read_bytes()


def _tokenizer() -> Any:
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    made.add_special_tokens(["</s>"])
    return json.loads(made.to_str())


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        members = {"a.png": _png(), "a.txt": b"a word", "b.png": _png()}
        for name, content in {**members, "b.json": b'{"caption": "b"}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _configs() -> list[dict[str, Any]]:
    made = [{**CONFIG_MAPPING[name]().to_dict(), "model_type": name} for name in DECODERS]
    return [json.loads(json.dumps(config, default=str)) for config in made]


INDEX = {"metadata": {"total_size": 56}, "weight_map": {
    f"{name}{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2) for name in TENSORS
}}  # fmt: skip
ROWS = [{"file_name": f"{name}.png", "text": name} for name in "ab"]


def parsers() -> dict[str, Parser]:
    """Return every parser by name."""
    return {
        "safetensors": Parser(damaged_header(save(TENSORS, {"a": "b"})), read_safetensors),
        "index.json": Parser(damaged_json(INDEX), read_index),
        "gguf": Parser(damaged_bytes(_gguf()), read_gguf),
        "config.json": Parser(st.one_of(map(damaged_json, _configs())), read_config),
        "tokenizer.json": Parser(damaged_json(_tokenizer()), read_tokenizer),
        "chat": Parser(st.one_of([damaged_lines([chat]) for chat in CHATS]), read_chat),
        "metadata.jsonl": Parser(damaged_lines(ROWS), read_metadata),
        "tar": Parser(damaged_bytes(_tar()), read_tar),
    }


# ---- the loop -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Figures of one parser. `failures`: the shortest case of each uncaught exception or hang."""

    cases: int = 0
    refused: int = 0
    longest: float = 0.0
    peak_mb: float = 0.0
    failures: dict[str, bytes] = field(default_factory=dict)


def fuzz(parser: Parser, seconds: float, first_seed: int = 0, keep: Path | None = None) -> Outcome:
    """Return the outcome of reading damaged files for a time. `keep` holds the case under way."""
    outcome, until, number = Outcome(), time.monotonic() + seconds, first_seed
    calm = settings(
        max_examples=200, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    while time.monotonic() < until:

        @seed(number)
        @calm
        @given(parser.cases)
        def check(content: bytes) -> None:
            if time.monotonic() > until:
                return
            if keep:
                keep.write_bytes(content)
            began = time.monotonic()
            outcome.cases += 1
            if failure := _failure(parser, content, outcome):
                shortest = outcome.failures.get(failure, content)
                outcome.failures[failure] = min(content, shortest, key=len)
            outcome.longest = max(outcome.longest, time.monotonic() - began)

        check()
        number += 1
    outcome.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return outcome


def _failure(parser: Parser, content: bytes, outcome: Outcome) -> str:
    """Return where a case fails, or "" if it is read or refused."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        try:
            with _limit():
                parser.read(Path(folder), content)
        except UserError as error:
            outcome.refused += 1
            return "an error of several lines" if "\n" in str(error) else ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # PanicException of Rust libraries is no Exception
            last = traceback.extract_tb(error.__traceback__)
            own = [
                f"{frame.filename}:{frame.lineno}" for frame in last if "jaxft/" in frame.filename
            ]
            reason = str(error).partition("'")[0][:60]  # paths would make each one different
            return f"{type(error).__name__}: {reason} at {own[-1] if own else ''}"
    return ""


@contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"hang of {CASE_SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
