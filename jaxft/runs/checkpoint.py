"""Orbax checkpoints of (state, data position, resolved config) as one unit, checked when read."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices

from jaxft.core.errors import DAMAGED, DISK_FULL, UserError
from jaxft.core.guards.faults import inject
from jaxft.core.guards.fingerprint import fingerprints, named_leaves, not_finite
from jaxft.core.guards.room import is_full, lack_of_room, nbytes
from jaxft.runs.agreement import gather

KEEP = 3
FAILURES = 3  # saves in a row without room on the disk, after which a run ends
CHECK = "prints"  # the item with the fingerprints, and the key of its digest beside the position
Found = TypeVar("Found")


class Damage(ValueError):
    """A checkpoint that is not as it was saved. The text is the reason."""


class Kept:
    """Choice of the checkpoints that stay: the newest `KEEP`, and the best one if there is one.

    Implements Orbax's PreservationPolicy.
    """

    def __init__(self) -> None:
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = len(checkpoints) - KEEP
        return [i >= newest or one.step == self.best for i, one in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run folder: the newest ones, and `kept.best`."""

    def __init__(self, workdir: Path):
        self.folder, self.kept = Path(workdir).resolve() / "checkpoints", Kept()
        self.failures, self._saving, self._saves = 0, 0, 0
        self._open()

    def _open(self) -> None:
        """Open the folder, and remove what saves have left that did not end."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.kept, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def check_room(self, state: Any, saves: int, best: bool) -> None:
        """Raise UserError in all processes if a run of `saves` more saves would fill the disk.

        An old checkpoint goes after a new one has come, so that one more than the run keeps needs
        room. best: the run keeps its best checkpoint beside the newest ones.
        """
        have, keep = len(self.manager.all_steps()), KEEP + best
        count = min(keep + 1 - min(have, keep), saves)
        if lack := self._lack(count * nbytes(state)):
            raise UserError(
                f"a run that keeps {keep} checkpoints {lack}; free space, choose a --workdir on"
                " another disk, or train less: trainable, lora.rank",
                DISK_FULL,
            )

    def _lack(self, needed: int) -> str:
        """Return why a save has no room, the same in all processes, or ""."""
        return next(filter(None, gather(lack_of_room(self.folder, needed))), "")

    def save(self, step: int, state: Any, config: dict, position: dict) -> None:
        """Start an asynchronous save. A step that is already saved is not written again.

        Without room on the disk, nothing is written and the run goes on, but not after FAILURES
        saves in a row. Raises: UserError for a state that is not finite, from which no run could
        go on, or after too many saves without room.
        """
        self._settle()
        if step in self.manager.all_steps():
            return
        if lack := self._lack(nbytes(state)):
            self._fail(f"step {step} is not saved: it {lack}")
            return
        if bad := not_finite(state):
            raise UserError(
                f"{bad[0]} and {len(bad) - 1} more arrays hold numbers that are NaN or infinite"
                f" after step {step}, which is not saved: lower optim.lr or lengthen optim.warmup,"
                " in another --workdir"
            )
        prints = fingerprints(state).items()
        leaves = {name: [one.number, list(one.shape), one.dtype] for name, one in prints}
        data = {**position, CHECK: _digest(leaves)}
        items = {"config": config, "data": data}
        items[CHECK] = {"leaves": leaves, "sha256": _digest([config, data])}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
            **{name: ocp.args.JsonSave(item) for name, item in items.items()},  # type: ignore[call-arg]
        )
        self._saving, self._saves = step, self._saves + 1
        self.manager.save(step, args=args)
        inject("save", self._saves, jax.process_index())

    def _settle(self) -> None:
        """Wait for the save under way, and count it."""
        if not self._saving:
            return
        step, self._saving = self._saving, 0
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            inject("ckpt", self._saves, jax.process_index(), self.folder / str(step))
        except Exception as error:  # Orbax and its libraries raise nearly every kind
            if not is_full(error):
                reason = next(iter(str(error).strip().splitlines()), "")[:160]
                raise UserError(
                    f"step {step} could not be saved in {self.folder} ({type(error).__name__}:"
                    f" {reason}); make that folder writable, and start the same command again",
                    DISK_FULL,
                ) from None
            if jax.process_index() == 0:
                for leftover in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            self._open()
            self._fail(f"the disk was full before step {step} was saved in {self.folder}")
        else:
            self.failures = 0

    def _fail(self, what: str) -> None:
        self.failures += 1
        newest = f"the newest checkpoint is that of step {self.latest() or 0}; free space"
        if self.failures >= FAILURES:
            raise UserError(f"{what}, as {FAILURES - 1} saves before; {newest}", DISK_FULL)
        print(f"{what}; {newest}, the run goes on", flush=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """Return (state, data position), as they were saved.

        `abstract` has the shapes and dtypes of the state and the shardings of this process.
        Checkpoints of versions before the fingerprints are not compared.
        Raises: UserError if there is no checkpoint of the step, or it is one of another model.
        Damage if it cannot be read as it was saved.
        """
        items = self._items(step)
        leaves = items.get(CHECK, {}).get("leaves")
        if leaves is not None:
            self._check_shapes(step, leaves, abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # type: ignore[call-arg]
        restored = _guarded(lambda: self.manager.restore(step, args=args))["state"]
        inject("restore", 1, jax.process_index())
        # The step donates its state. Orbax's buffers cannot be donated (jax-ml/jax#18617).
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        own = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places)
        state = own(restored)
        if leaves is not None:
            for name, one in fingerprints(state).items():
                if leaves[name][0] != one.number:
                    raise Damage(f"{name} is not as it was saved")
        return state, items["data"]

    def config(self, step: int) -> dict:
        """Return the resolved config that was saved with a step. Raises as `restore`."""
        return self._items(step)["config"]

    def newest(
        self, read: Callable[[int], Found], first: int | None = None
    ) -> tuple[int, Found, dict[int, str]]:
        """Return (step, result, damaged) of `read` for the newest step where it does not fail.

        first: a step to try before the newest. `damaged` are the steps that failed, and the reason
        of each. Raises: UserError if no step is left.
        """
        damaged: dict[int, str] = {}
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in sorted(steps, key=lambda one: one != first):
            try:
                return step, read(step), damaged
            except Damage as damage:
                damaged[step] = str(damage)
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise UserError(
            f"{self.folder} has no checkpoint that is as it was saved ({reasons}); put back a copy,"
            " or start again in another --workdir",
            DAMAGED,
        )

    def set_aside(self, damaged: Mapping[int, str], start: int) -> None:
        """Rename damaged steps to N.bad, and say from which one the run goes on.

        All processes have to call it.
        """
        if not damaged:
            return
        for step, reason in damaged.items():
            aside = self.folder / f"{step}.bad"
            if jax.process_index() == 0:
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}0")
                (self.folder / str(step)).rename(aside)
            print(f"the checkpoint of step {step} is damaged ({reason}): renamed {aside.name}")
        print(f"going on from step {start}, whose checkpoint is as it was saved", flush=True)
        sync_global_devices("set aside")
        self.manager.reload()

    def _items(self, step: int) -> dict[str, Any]:
        """Return the small items of a step by name, compared with their checksums."""
        if step not in self.manager.all_steps():
            have = ", ".join(map(str, self.manager.all_steps())) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}; there are: {have}")
        names = ["config", "data"]
        if (self.folder / str(step) / CHECK).exists():
            names.append(CHECK)
        args = ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in names})  # type: ignore[call-arg]
        found = _guarded(lambda: self.manager.restore(step, args=args))
        items = {name: found[name] for name in names}
        if not all(isinstance(item, dict) for item in items.values()):
            raise Damage("config, data position or fingerprints are empty")
        if CHECK in items or CHECK in items["data"]:
            made = items.get(CHECK, {})
            whole = made.get("sha256") == _digest([items["config"], items["data"]])
            if not whole or items["data"].get(CHECK) != _digest(made.get("leaves")):
                raise Damage("config, data position or fingerprints are not as they were saved")
        position = {key: value for key, value in items["data"].items() if key != CHECK}
        return {**items, "data": position}

    def _check_shapes(self, step: int, leaves: Mapping[str, Any], abstract: Any) -> None:
        """Raise UserError where the state of the run has other arrays than the checkpoint."""
        named = named_leaves(abstract).items()
        wanted = {name: [list(x.shape), np.dtype(x.dtype).name] for name, x in named}
        for name in sorted(wanted.keys() | leaves.keys()):
            saved = leaves[name][1:] if name in leaves else "no such array"
            if (now := wanted.get(name, "no such array")) != saved:
                raise UserError(
                    f"checkpoint {step} in {self.folder} has {saved} for {name}, but the model now"
                    f" has {now}; put the model of the run back, or use another --workdir"
                )

    def wait(self) -> None:
        """Block until every save is on disk. Raises: UserError if the last one is not."""
        self._settle()
        if self.failures:
            raise UserError(
                f"the last step is not saved, because {self.folder} has no room; free space, and"
                f" start the same command again: it goes on from step {self.latest() or 0}",
                DISK_FULL,
            )

    def close(self) -> None:
        self.wait()
        self.manager.close()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _guarded(read: Callable[[], Found]) -> Found:
    """Return `read()`. Raises: Damage for what Orbax raises on files that are not as it wrote them.

    A full memory and a file that this user may not read are no damage.
    """
    try:
        return read()
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # Orbax and its libraries raise nearly every kind
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")[:160]
        raise Damage(f"{type(error).__name__}: {reason}") from None
