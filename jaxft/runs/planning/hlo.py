"""Costs of a compiled program, counted in the text of its HLO: FLOPs, traffic and collectives.

XLA's own cost analysis counts the body of a loop once, and has no figures for a GPU that is not
here. Bytes and structure are exact. Times that follow from them are an upper bound on speed.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod, sqrt
from typing import NamedTuple

import numpy as np

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Operations that move no data, or whose bodies are counted on their own.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "iota", "partition-id", "replica-id", "async-start", "async-update",
}  # fmt: skip
ATTENTION_FLOPS = {"forward": 4, "backward": 10}  # for each query, key, head and dim
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
ON_CHIP = re.compile(r"S\([12]\)")  # the layout of an array in a TPU's vector memory


class Op(NamedTuple):
    """One instruction. `type` and `attributes` are text, `operands` names of this computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def scope(self) -> str:
        """The names of the functions and scopes that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The name of a custom call's kernel, or ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Op]  # by name, in order: the last is the root


class Cost(NamedTuple):
    """Costs of one instruction: FLOPs and bytes of main memory each time, and how often it runs.

    moved: the bytes of a collective.
    """

    op: Op
    times: float
    flops: float
    traffic: float
    moved: float


def costs(text: str) -> list[Cost]:
    """Return the costs of every instruction that runs on its own, from `compiled.as_text()`."""
    computations, entry = parse(text)
    times, fused = _multiplicities(computations, entry)
    return [
        _cost(op, computations, name, times[name])
        for name, ops in computations.items()
        if times[name] and name not in fused
        for op in ops.values()
        if op.opcode not in FREE and not op.opcode.endswith("-done")
    ]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of an HLO module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":  # an attribute of several lines may start with "}" too
            current = None
        elif current is not None and (op := _instruction(line)):
            current[op.name] = op
    return computations, entry


def _instruction(line: str) -> Op | None:
    found = re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    cut = _closing(found[2]) if found[2].startswith("(") else found[2].index(" ")
    kind, rest = found[2][:cut], found[2][cut:].lstrip()
    call = re.match(r"([\w\-]+)\(", rest)
    if not call:
        return None
    end = _closing(rest[call.end() - 1 :]) + call.end() - 1
    inside = rest[call.end() : end - 1]
    if call[1] in ("constant", "parameter"):
        return Op(found[1], kind, call[1], (inside,), rest[end:])
    names = re.findall(r"%([\w.\-]+)", inside)
    return Op(found[1], kind, call[1], tuple(names), rest[end:])


def _closing(text: str) -> int:
    """Return the place after the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


# ---- how often a computation runs ------------------------------------------------------------


def _multiplicities(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, float], set[str]]:
    """Return how often each computation runs, and those inside of fusions."""
    times: dict[str, float] = defaultdict(float)
    fused: set[str] = set()

    def visit(name: str, count: float, inside: bool) -> None:
        times[name] += count
        if inside:
            fused.add(name)
        for op in computations[name].values():
            trips = _trips(op, computations) if op.opcode == "while" else 1
            # A reduction's or a sort's function is part of that instruction.
            within = inside or op.opcode not in ("while", "conditional", "call", "async-start")
            for called in _called(op):
                if called in computations:
                    visit(called, count * trips, within)

    visit(entry, 1.0, False)
    return times, fused


def _called(op: Op) -> list[str]:
    keys = "body|calls|to_apply|called_computations|branch_computations"
    keys += "|true_computation|false_computation"
    found = re.findall(rf"(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", op.attributes)
    return [name for many, one in found for name in re.findall(r"[\w.\-]+", many or one)]


def _trips(loop: Op, computations: dict[str, Computation]) -> int:
    """Return the number of iterations: XLA's own figure, or that of a counter from 0."""
    known = re.search(r"known_trip_count\D+(\d+)", loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        computations.get(found[1], {}) if found else {}
        for found in (
            re.search(rf"{key}=%?([\w.\-]+)", loop.attributes) for key in ("condition", "body")
        )
    )
    numbers = [int(op.operands[0]) for op in condition.values() if _is_whole(op)]
    bound, step = max(numbers, default=1), 1
    places = [op.attributes for op in condition.values() if op.opcode == "get-tuple-element"]
    index = re.search(r"index=(\d+)", places[0]) if places else None
    if index and body:
        results = list(body.values())[-1].operands
        step = _added(results[int(index[1])], body) if int(index[1]) < len(results) else 1
    return max(1, -(-bound // step))


def _added(name: str, body: Computation) -> int:
    """Return the constant that a loop adds to its counter, by the name of the new counter."""
    op = body.get(name)
    while op is not None and op.opcode in ("copy", "bitcast") and op.operands:
        op = body.get(op.operands[0])
    if op is None or op.opcode != "add":
        return 1
    terms = [body[term] for term in op.operands if term in body]
    return max([int(term.operands[0]) for term in terms if _is_whole(term)], default=1)


def _is_whole(op: Op) -> bool:
    return op.opcode == "constant" and op.operands[0].isdigit()


# ---- bytes -----------------------------------------------------------------------------------


def size(kind: str) -> int:
    """Return the bytes of main memory of a type, which may be a tuple."""
    return sum(
        BITS[name] * prod(_numbers(dims)) // 8
        for name, dims, layout in SHAPE.findall(kind)
        if name in BITS and not ON_CHIP.search(layout)
    )


def shape(kind: str) -> list[int]:
    """Return the dims of a type's first array."""
    found = SHAPE.search(kind)
    return _numbers(found[2]) if found else []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _cost(op: Op, computations: dict[str, Computation], name: str, times: float) -> Cost:
    ops = computations[name]
    kinds = [ops[one].type if one in ops else "" for one in op.operands]
    collective = op.opcode.removesuffix("-start")
    if collective in COLLECTIVES:
        read, made = sum(map(size, kinds)), size(op.type)
        if op.opcode.endswith("-start") and op.type.startswith("("):
            made = max(made - read, 0)  # the type has the operands too
        moved = read if collective in ("all-reduce", "reduce-scatter") else made or read
        return Cost(op, times, 0.0, 0.0, float(moved))
    flops = sum(_flops(one, inner, computations) for one, inner in _within(op, ops, computations))
    return Cost(op, times, flops, float(_traffic(op, kinds, computations)), 0.0)


def _within(
    op: Op, ops: Computation, computations: dict[str, Computation]
) -> Iterator[tuple[Op, Computation]]:
    """Yield an instruction and, if it is a fusion, those inside, each with its computation."""
    yield op, ops
    if op.opcode == "fusion":
        for called in _called(op):
            inner = computations.get(called, {})
            for one in inner.values():
                yield from _within(one, inner, computations)


def _traffic(op: Op, kinds: list[str], computations: dict[str, Computation]) -> int:
    made, read = size(op.type), sum(map(size, kinds))
    if op.opcode == "fusion":
        inner = computations.get(next(iter(_called(op)), ""), {})
        return _fusion_reads(inner, kinds) + min(_written(inner), made)
    if op.opcode in ("dynamic-slice", "gather", "slice", "slice-start"):
        return 2 * made
    if op.opcode in ("dynamic-update-slice", "scatter") and len(kinds) > 1:
        return 2 * size(kinds[-1] if op.opcode == "scatter" else kinds[1])
    if op.opcode == "copy-start":
        return 2 * min(made, read)
    return made + read


def _fusion_reads(inner: Computation, kinds: list[str]) -> int:
    """Return the bytes that a fusion reads. Of an operand that it only slices, just the slices."""
    users: dict[str, list[Op]] = defaultdict(list)
    for op in inner.values():
        for name in op.operands:
            users[name].append(op)
    total = 0
    for op in inner.values():
        if op.opcode == "parameter":
            place = int(op.operands[0])
            whole = size(kinds[place]) if place < len(kinds) else 0
            sliced = _sliced(op.name, users)
            total += whole if sliced is None else min(sliced, whole)
    return total


def _sliced(name: str, users: dict[str, list[Op]]) -> int | None:
    """Return the bytes of all slices of a value, or None if an instruction reads it whole."""
    total = 0
    for user in users[name]:
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
            total += size(user.type)
        elif user.opcode == "bitcast":
            inside = _sliced(user.name, users)
            if inside is None:
                return None
            total += inside
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return None
    return total


def _written(inner: Computation, name: str = "") -> int:
    """Return the bytes that a fusion writes. Of an array updated in place, just the update."""
    if not inner:
        return 0
    op = inner[name] if name else list(inner.values())[-1]
    if op.opcode == "dynamic-update-slice":
        return size(inner[op.operands[1]].type)
    if op.opcode == "tuple":
        return sum(_written(inner, one) for one in op.operands)
    if op.opcode == "bitcast":
        return min(_written(inner, op.operands[0]), size(op.type))
    return size(op.type)


# ---- FLOPs -----------------------------------------------------------------------------------


def _flops(op: Op, ops: Computation, computations: dict[str, Computation]) -> float:
    shapes = [shape(ops[name].type) if name in ops else [] for name in op.operands]
    made = shape(op.type)
    if op.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        dims = _numbers(summed[1]) if summed else []
        return 2.0 * prod(made) * prod(shapes[0][dim] for dim in dims)
    if op.opcode == "convolution":
        return _window_flops(shapes[0], shapes[1], made, op.attributes)
    if "cublas" in op.target:
        batch = re.search(r'"lhs_batch_dimensions":\[([^\]]*)\]', op.attributes)
        count = prod(shapes[0][dim] for dim in _numbers(batch[1])) if batch else 1
        return 2 * sqrt(prod(shapes[0]) * prod(shapes[1]) * prod(made) / count)
    if op.target.startswith("__cudnn$conv"):
        if "BackwardInput" in op.target:
            return _convolution(shapes[0], shapes[1], op)
        if "BackwardFilter" in op.target:
            return _convolution(shapes[1], made, op)
        return _convolution(made, shapes[1], op)
    if op.target.startswith("__cudnn$fmha"):
        return _attention(op, shapes[0])
    stated = re.search(r'"?flops"?:\s*"?(\d+)', op.attributes)  # of a Pallas kernel
    return float(stated[1]) if op.opcode == "custom-call" and stated else 0.0


def _window_flops(image: list[int], kernel: list[int], made: list[int], attributes: str) -> float:
    """Return the FLOPs of a convolution without products with padding or with inserted zeros.

    A TPU computes a matrix product over heads as a convolution that is padding for the most part.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        return 0.0
    places = [labels[1].index(one) for one in sorted(filter(str.isdigit, labels[1]))]
    results = [labels[3].index(one) for one in sorted(filter(str.isdigit, labels[3]))]
    settings = re.findall(
        r"(\w+)=([-\dx_]+)", attributes.partition("window={")[2].partition("}")[0]
    )
    window = {name: value.split("x") for name, value in settings}
    ones = ["1"] * len(places)
    pairs = 1  # of an output pixel and a weight
    for dim, (place, result) in enumerate(zip(places, results, strict=True)):
        stride, inside, apart = (
            int(window.get(name, ones)[dim]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"][dim].split("_")[0]) if "pad" in window else 0
        weights = np.arange(int(window.get("size", ones)[dim])) * apart
        read = np.arange(made[result])[:, None] * stride + weights - low
        valid = (read >= 0) & (read <= (image[place] - 1) * inside) & (read % inside == 0)
        pairs *= int(valid.sum())
    features = kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
    return 2.0 * made[labels[3].index("b")] * features * pairs


def _convolution(image: list[int], kernel: list[int], op: Op) -> float:
    """Return 2 x (output pixels and channels) x (weights of one output channel), for cuDNN."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.attributes)
    outputs = kernel[labels[1].index("o")] if labels else 1
    return 2.0 * prod(image) * prod(kernel) / max(outputs, 1)


def _attention(op: Op, q: list[int]) -> float:
    """Return the FLOPs of cuDNN's attention. A causal mask leaves half of them."""
    found = re.search(
        r'"intermediate_tensor_shape":\{[^}]*"dimensions":\[([^\]]*)\]', op.attributes
    )
    scores = _numbers(found[1]) if found else []  # [B, N, T, S]
    half = 0.5 if "CAUSAL" in op.attributes else 1.0
    way = "backward" if "Backward" in op.target else "forward"
    return half * ATTENTION_FLOPS[way] * prod(scores) * (q[-1] if q else 0)
