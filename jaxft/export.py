"""Give weights back: `python -m jaxft.export --workdir DIR [--step N] [--out DIR] [--kind …]`."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxft import run as runs
from jaxft.core import config as configs
from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.nn import lora
from jaxft.run import ADAPTERS, Run
from jaxft.weights import adapters, transfer
from jaxft.weights.tensor_files import write_sharded
from jaxft.weights.transfer import Part


def main(argv: list[str] | None = None) -> int:
    """Export any checkpoint step, merged or as an adapter, in any dtype."""
    return runtime.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    options, _ = configs.parse_arguments(argv, ("workdir", "step", "out", "kind", "dtype"))
    if "workdir" not in options:
        raise UserError("--workdir is missing: python -m jaxft.export --workdir DIR")
    dtypes = configs.CHOICES["export.dtype"]
    if options.get("dtype", "source") not in dtypes:
        raise UserError(f"--dtype={options['dtype']!r} is not one of {', '.join(dtypes)}")
    workdir = Path(options["workdir"])
    run, params, step = runs.restore_run(workdir, runs.step_option(options))
    kind = options.get("kind", run.cfg.export.kind)
    if kind not in (kinds := [kind for kind in run.task.EXPORT_KINDS if kind != "none"]):
        raise UserError(f"--kind={kind!r} is not one of {', '.join(kinds)}")
    out = Path(options.get("out", workdir / "export"))
    with jax.set_mesh(run.mesh):
        export_folder(run, params, out, kind, options.get("dtype", run.cfg.export.dtype))
    print(f"step {step} of {workdir} exported to {out}")


def export_folder(
    run: Run, params: Mapping[str, jax.Array], out: Path, kind: str, dtype: str
) -> None:
    """Write what `kind` names and rename it in place.

    "merged" and "folder" are a Hugging Face folder, "adapter" a PEFT folder. `params` holds at
    least what was trained. Nothing stands under `out` until all is written.
    """
    if kind == "adapter" and not run.cfg.lora.rank:
        raise UserError("export.kind='adapter' needs lora.rank > 0; use export.kind='merged'")
    temporary = out.with_name(f"{out.name}.partial-{os.getpid()}")
    for stale in out.parent.glob(f"{out.name}.partial-*"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    write = _write_adapter if kind == "adapter" else _write_merged
    rewritten = [part for part in run.task.parts if not part.aid and _touched(run, part, dtype)]
    for part in rewritten:
        write(run, part, params, temporary, dtype)
    stated = None if dtype == "source" else dtype
    for name, content in run.task.side_files(stated, {part.prefix for part in rewritten}).items():
        if kind == "adapter" and name in ("config.json", "generation_config.json"):
            continue
        _copy(content, temporary / name)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def _write_merged(run: Run, part: Part, params: Mapping, folder: Path, dtype: str) -> None:
    np_dtype = None if dtype == "source" else np.dtype(runtime.resolve_dtype(dtype))
    whole = part.tensors is None
    trained = {p: params[p] for p in run.leaves if whole or p in run.chosen}
    made = transfer.export(part, run.leaves, trained, _deltas(run, params), np_dtype)
    (folder / part.folder).mkdir(exist_ok=True)
    write_sharded(folder / part.folder, made.tensors, made.infos, stem=part.stem)


def _touched(run: Run, part: Part, dtype: str) -> bool:
    """Whether a part's files differ from the source's; the others are copied as they are."""
    trained = any(path.startswith(part.prefix) for path in run.chosen)
    return trained or part.tensors is None or dtype != "source" or not part.prefix


def _deltas(run: Run, params: Mapping) -> dict[str, Callable[[int], np.ndarray]]:
    """The fp32 update of every adapted kernel, layer by layer."""
    factor = lora.scale(run.cfg.lora) if run.cfg.lora.rank else 0.0
    deltas: dict[str, Callable[[int], np.ndarray]] = {}
    for path in lora.adapted(run.leaves):
        a, b = (transfer.to_host(params[f"{path}.lora_{x}"]) for x in "ab")
        stacked = run.leaves[f"{path}.kernel"].stacked
        deltas[f"{path}.kernel"] = partial(_layer_delta, a, b, factor, stacked)
    return deltas


def _layer_delta(a: np.ndarray, b: np.ndarray, factor: float, stacked: bool, i: int) -> np.ndarray:
    return lora.delta(a[i], b[i], factor) if stacked else lora.delta(a, b, factor)


def _write_adapter(run: Run, part: Part, params: Mapping, folder: Path, dtype: str) -> None:
    arrays = {p: transfer.to_host(params[p]) for p in run.leaves if re.fullmatch(ADAPTERS, p)}
    adapters.write(folder, part, run.leaves, arrays, run.cfg.lora, run.cfg.model)


def _copy(content: Path | bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        shutil.copyfile(content, target)


if __name__ == "__main__":
    sys.exit(main())
