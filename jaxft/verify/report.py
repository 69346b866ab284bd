"""The parts of a certificate: figures with bounds, the round trip's bytes, the file."""

import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxft.core import processes, runtime
from jaxft.core.errors import UserError
from jaxft.core.metrics import table
from jaxft.core.params import Leaf, Params
from jaxft.core.sharding import one_device_mesh
from jaxft.verify import rounding
from jaxft.verify.rounding import bound, digest
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.transformers import Source
from jaxft.weights.transfer import Part

# XLA:CPU's fused matmuls round a quarter more than torch's. Its plain ones round like torch's.
PLAIN_DOTS = {"xla_cpu_experimental_ynn_fusion_type": ""}
# A tensor's norm below this share of the whole gradient's norm may be rounding alone (a key bias
# without positions has the gradient 0), and its size depends on the order of the sums. The error of
# the tensor is then measured against this share.
ROUNDING_FLOOR = 1e-3


class Check(NamedTuple):
    """One figure of a certificate. It passes at or below its bound.

    A figure whose bound is None is shown but not judged. rounding: the oracle's own, of which the
    bound is a multiple.
    """

    name: str
    figure: float
    bound: float | None
    note: str = ""
    rounding: float | None = None

    @property
    def passed(self) -> bool:
        return self.bound is None or self.figure <= self.bound

    def record(self) -> dict[str, Any]:
        """Return the check for JSON, which has no NaN: a figure that is not finite is null."""
        figure = self.figure if math.isfinite(self.figure) else None
        return {**self._asdict(), "figure": figure, "passed": self.passed}


def start(oracles: Iterable[str]) -> None:
    """Find the devices. Raises UserError if a package to compare with is not installed."""
    if missing := [name for name in oracles if find_spec(name) is None]:
        raise UserError(f"verify needs {' and '.join(missing)}: pip install 'jaxft[verify]'")
    processes.start()


def certificate(
    spec: str, checks: list[Check], oracles: Iterable[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of parity.json: verdict, figures and bounds, and the versions compared."""
    return {
        "model": spec,
        "passed": all(check.passed for check in checks),
        "checks": [check.record() for check in checks],
        **about,
        "oracles": {name: version(name) for name in oracles},
        **runtime.manifest(one_device_mesh(), {}),
    }


@contextmanager
def hf_folder(source: Source) -> Iterator[Path]:
    """Yield the folder that transformers reads.

    It is the model's own folder, or a temporary copy of a model that is in no folder.
    """
    if source.folder is not None:
        yield source.folder
        return
    assert source.tensors is not None
    tensors = source.tensors
    with tempfile.TemporaryDirectory(prefix="jaxft-verify-") as name:
        keys = tensors.keys()
        infos = {key: tensors.info(key) for key in keys}
        write_sharded(Path(name), ((key, tensors.read(key)) for key in infos), infos)
        for file, content in source.side_files.items():
            made = content if isinstance(content, bytes) else content.read_bytes()
            (Path(name) / file).write_bytes(made)
        yield Path(name)


def loading(name: str, report: Mapping[str, Any]) -> list[Check]:
    """Return checks of the keys that a stock library, `name`, missed or did not expect."""
    found = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    return [
        Check(f"{kind} keys in {name}", len(keys), 0, ", ".join(keys[:4]))
        for kind, keys in found.items()
    ]


def worst_gradient(
    name: str,
    ours: Iterable[tuple[str, np.ndarray]],
    theirs: Mapping[str, np.ndarray],
    distances: Mapping[str, float],
) -> Check:
    """Return the error |ours - theirs| / |theirs| of the worst tensor.

    The worst tensor exceeds its bound most, or comes nearest to it. distances: norms of the
    differences of the oracle's own gradients under other roundings. The bound of a tensor comes
    from its own distance, and is at least that of the median distance, which is not small by luck.
    A gradient that only one side has has an infinite error.
    """
    norms = {key: float(np.linalg.norm(one)) for key, one in theirs.items()}
    floor = ROUNDING_FLOOR * math.hypot(*norms.values())
    errors = dict.fromkeys(theirs, math.inf)
    for key, mine in ours:
        wanted, error = theirs.get(key), math.nan
        if wanted is not None and wanted.shape == mine.shape:
            error = float(np.linalg.norm(mine - wanted) / max(norms[key], floor))
        errors[key] = math.inf if math.isnan(error) else error
    relative = {key: one / max(norms[key], floor) for key, one in distances.items()}
    typical = statistics.median(relative.values() or [0.0])
    own = {key: max(relative.get(key, 0.0), typical) for key in errors}
    worst = max(errors, key=lambda key: errors[key] / bound(own[key]))
    return Check(name, errors[worst], bound(own[worst]), worst, own[worst])


def same_weights(
    name: str, ours: Iterable[tuple[str, np.ndarray]], theirs: Mapping[str, str]
) -> Check:
    """Count the tensors in which ours and the oracle's differ in any bit, widened to float32.

    `theirs` are digests by key. Outputs cannot reveal a small change of one weight, because a
    thousandth of one element of a large matrix is below their rounding. This comparison reveals
    any.
    """
    count, differing = 0, []
    for key, array in ours:
        count += 1
        if digest(array) != theirs.get(key):
            differing.append(key)
    note = f"of {count}" + "".join(f"; {key}" for key in differing[:4])
    return Check(name, len(differing), 0, note)


def round_trip(
    name: str, part: Part, leaves: Mapping[str, Leaf], params: Params
) -> tuple[Check, str]:
    """Export the imported weights in memory, and compare them with the source's bytes.

    Returns the check, and a digest of the source's bytes.
    """
    digest, differing, count = hashlib.sha256(), [], 0
    assert part.tensors is not None
    own = {path: x for path, x in params.items() if not leaves[path].added}
    for key, array in transfer.export(part, leaves, own, {}, None).tensors:
        tensor, count = part.tensors.read(key), count + 1
        content = tensor.tobytes()
        digest.update(key.encode() + content)
        if (array.dtype, array.shape) != (tensor.dtype, tensor.shape) or array.tobytes() != content:
            differing.append(key)
    note = f"of {count}" + "".join(f"; {key}" for key in differing[:4])
    return Check(name, len(differing), 0, note), digest.hexdigest()


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Write parity.json. Raises UserError if the file cannot be written."""
    try:
        out.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); give another --out=FILE") from None


def show(checks: list[Check], out: Path) -> None:
    """Print every figure, and the checks that failed."""
    rows = [
        (
            check.name,
            f"{check.figure:.3g}",
            "" if check.bound is None else f"{check.bound:.3g}",
            "" if check.rounding is None else f"{check.rounding:.3g}",
            ("pass" if check.passed else "FAIL") if check.bound is not None else "",
            check.note,
        )
        for check in checks
    ]
    print(table(rows, ("check", "figure", "bound", "torch's own", "", "")))
    failed = [check.name for check in checks if not check.passed]
    verdict = f"FAILED {len(failed)} checks ({'; '.join(failed[:6])})" if failed else "PASSED"
    print(f"{verdict}; written to {out}")


def compare_logits(
    name: str,
    ours: Float[np.ndarray, "B T V"],
    theirs: Float[np.ndarray, "B T V"],
    others: Sequence[Float[np.ndarray, "B T V"]],
) -> list[Check]:
    """Return checks of logits: largest difference, KL and top-1.

    The difference is also given relative to the largest logit. `others` are the oracle's logits
    under other roundings. KL(theirs || ours) is summed over the vocabulary and maximised over
    positions. It grows with the square of a difference, and so does its bound. Two choices whose
    logits in the oracle are apart by at most twice the bound are no disagreement.
    """
    largest = float(np.abs(theirs).max())
    apart, own = rounding.apart(ours, theirs), rounding.farthest(theirs, others)
    allowed = rounding.bound(own, largest)
    kl = rounding.divergence(theirs, ours)
    own_kl = max(rounding.divergence(theirs, one) for one in others)
    least = (rounding.FLOAT32_UNIT * largest) ** 2
    chosen = np.take_along_axis(theirs, ours.argmax(-1)[..., None], -1)[..., 0]
    lost = theirs.max(-1) - chosen
    agreement = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
    return [
        Check(f"{name} logits, max abs", apart, allowed, "", own),
        Check(f"{name} logits, max relative", apart / largest, None, "", own / largest),
        Check(
            f"{name} KL, max over positions",
            kl,
            rounding.MULTIPLE**2 * max(own_kl, least),
            "",
            own_kl,
        ),
        Check(
            f"{name} top-1 disagreements",
            int((lost > 2 * allowed).sum()) if np.isfinite(ours).all() else math.nan,
            0,
            f"{agreement:.1%} of {lost.size} agree",
        ),
    ]
