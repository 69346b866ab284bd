"""Orbax checkpoints of (state, data position, resolved config) as one unit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxft.core.errors import UserError

KEEP = 3


class Checkpoints:
    """The checkpoints of one run folder. The newest `KEEP` are kept."""

    def __init__(self, workdir: Path):
        self.folder = Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any, config: dict, position: dict) -> None:
        """Start an asynchronous save. A step that is already saved is not written again."""
        if step in self.manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
            config=ocp.args.JsonSave(config),  # type: ignore[call-arg]
            data=ocp.args.JsonSave(position),  # type: ignore[call-arg]
        )
        self.manager.save(step, args=args)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """Return (state, data position).

        `abstract` has the shapes and dtypes of the state and the shardings of this process.
        Raises: UserError if there is no checkpoint of the step.
        """
        self._check(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),  # type: ignore[call-arg]
            data=ocp.args.JsonRestore(),  # type: ignore[call-arg]
        )
        restored = self.manager.restore(step, args=args)
        # The step donates its state. Orbax's buffers cannot be donated (jax-ml/jax#18617).
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        own = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places)
        return own(restored["state"]), restored["data"]

    def config(self, step: int) -> dict:
        """Return the resolved config that was saved with a step. Raises as `restore`."""
        self._check(step)
        args = ocp.args.Composite(config=ocp.args.JsonRestore())  # type: ignore[call-arg]
        return self.manager.restore(step, args=args)["config"]

    def _check(self, step: int) -> None:
        if step not in self.manager.all_steps():
            have = ", ".join(map(str, self.manager.all_steps())) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}; there are: {have}")

    def wait(self) -> None:
        """Block until every save is on disk. Raises errors of the saves in the background."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self.manager.close()
