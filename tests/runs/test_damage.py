"""Checkpoints whose files rot: no state comes back that was not saved, and the run goes on."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import evaluate, export, train
from jaxft.core.errors import UserError
from jaxft.runs.checkpoint import CHECK, Checkpoints
from jaxft.runs.pages.card import CARD
from tests.interrupted import timeless
from tests.runs.test_checkpoint import CONFIG, abstract, assert_same_bits, host_state, placed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def states():
    """The states of steps 1 and 2. Files of small arrays have checksums of Orbax's own."""
    first = placed(host_state(columns=4096), (8, 1, 1))
    return {1: first, 2: jax.tree.map(lambda x: x + 1, first)}


@pytest.fixture(scope="module")
def whole(states, tmp_path_factory):
    """A folder with the checkpoints of both steps."""
    place = tmp_path_factory.mktemp("whole")
    saved = Checkpoints(place)
    for step, state in states.items():
        saved.save(step, state, CONFIG, {"next_step": step})
    saved.close()
    return place


@pytest.fixture
def read(whole, states, tmp_path):
    """`read(change)`: change files of step 2 in a copy, and return the step that is read then."""

    def check(change):
        place = tmp_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        change(place / "checkpoints" / "2")
        saved = Checkpoints(place)
        target = abstract(states[1])

        def both(step):
            return saved.config(step), saved.restore(step, target)

        step, (config, (state, position)), damaged = saved.newest(both)
        assert_same_bits(state, jax.device_get(states[step]))
        assert config == CONFIG and position == {"next_step": step}
        assert bool(damaged) == (step == 1)
        saved.set_aside(damaged, step)
        saved.save(2, states[2], CONFIG, {"next_step": 2})  # the run comes to this step again
        saved.close()
        names = {path.name for path in (place / "checkpoints").iterdir()}
        assert names == ({"1", "2", "2.bad"} if damaged else {"1", "2"})
        return step

    return check


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def arrays(folder):
    """The files with the numbers: the others of Orbax are smaller."""
    files = [path for path in (folder / "state").rglob("d/*") if path.is_file()]
    return [max(files, key=lambda path: path.stat().st_size)]


SMALL = ("config/metadata", "data/metadata", f"{CHECK}/metadata")


def test_s5_flips_in_array_files_are_caught(read):
    for trial in range(60):
        rng = np.random.default_rng(trial)
        assert read(lambda folder, rng=rng: flip(arrays(folder)[0], rng)) == 1, trial


@pytest.mark.parametrize("name", SMALL)
def test_s5_flips_in_small_files_are_caught(read, name):
    for trial in range(7):
        rng = np.random.default_rng(trial)
        assert read(lambda folder, rng=rng: flip(folder / name, rng)) == 1, trial


def test_s5_flips_in_any_file_are_caught_or_harmless(read):
    """Orbax does not read every byte that it writes, such as the time of the save."""
    for trial in range(20):
        rng = np.random.default_rng(trial)

        def change(folder, rng=rng):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            flip(files[rng.integers(len(files))], rng)

        read(change)


@pytest.mark.parametrize("how", ["truncated", "emptied", "deleted"])
@pytest.mark.parametrize("name", [*SMALL, "array", "state/_METADATA", "state/manifest.ocdbt"])
def test_s4_cut_and_missing_files_fall_back(read, name, how):
    def change(folder):
        file = arrays(folder)[0] if name == "array" else folder / name
        content = file.read_bytes()
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2 if how == "truncated" else 0])

    assert read(change) == 1


@pytest.mark.parametrize("name", ["", "state", "config", "data", CHECK])
def test_s4_emptied_and_missing_folders_fall_back(read, name):
    def empty(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    assert read(empty) == 1
    if name:
        assert read(lambda folder: shutil.rmtree(folder / name)) == 1


def test_s4_no_step_is_renamed_where_none_is_left(whole, states, tmp_path):
    place = Path(shutil.copytree(whole, tmp_path / "copy"))
    for file in (place / "checkpoints").rglob("config/metadata"):
        file.write_text("")
    saved = Checkpoints(place)
    with pytest.raises(
        UserError, match=r"no checkpoint that is as it was saved \(step 2: .*step 1"
    ):
        saved.newest(lambda step: saved.restore(step, abstract(states[1])))
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["1", "2"]


def test_s8_checkpoints_without_fingerprints_are_restored(whole, states, tmp_path):
    """A version before them wrote the same three items."""
    place = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(place / "checkpoints" / "2" / CHECK)
    (place / "checkpoints" / "2" / "data" / "metadata").write_text('{"next_step": 2}')
    saved = Checkpoints(place)
    state, position = saved.restore(2, abstract(states[1]))
    assert_same_bits(state, jax.device_get(states[2]))
    assert position == {"next_step": 2} and saved.config(2) == CONFIG


def test_another_model_is_no_damage(whole, states):
    other = abstract(states[1])
    other.params["a.kernel"] = jax.ShapeDtypeStruct(
        (4, 4), jnp.float32, sharding=other.step.sharding
    )
    saved = Checkpoints(whole)
    with pytest.raises(
        UserError, match=r"checkpoint 2 .* has .*8, 4096.* for params\.a\.kernel, but"
    ):
        saved.newest(lambda step: saved.restore(step, other))


def test_d9_a_state_that_is_not_finite_is_not_saved(states, tmp_path):
    spoilt = states[1]._replace(params={**states[1].params, "b.kernel": jnp.full((2, 2), jnp.nan)})
    saved = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"params\.b\.kernel and 0 more .* after step 3"):
        saved.save(3, spoilt, CONFIG, {})
    saved.close()
    assert Checkpoints(tmp_path).latest() is None


@pytest.mark.usefixtures("quick", "one_thread")
def test_s4_a_run_goes_on_from_the_step_before(make_folder, make_flags, tmp_path, capsys):
    """The same losses and weights as without the damage, and the commands on a damaged folder."""
    keys = {"total": "6_steps", "every.save": "2_steps", "mesh.fsdp": 1, "batch_size": 8}
    flags = make_flags(make_folder(), keys)
    config = ["--config", str(ROOT / "configs" / "llm.py")]
    for name in ("straight", "broken"):
        assert train.main([*config, "--workdir", str(tmp_path / name), *flags]) == 0
    work = tmp_path / "broken"
    file = arrays(work / "checkpoints" / "6")[0]  # a flipped bit may lie where nothing is read
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(work)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint of step 6 is damaged" in shown and "step 4 is used" in shown
    assert (work / "evaluation-4.json").exists()
    assert export.main(["--workdir", str(work), "--step=6"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "step 6" in error[0] and "damaged" in error[0]
    shutil.rmtree(work / "export")
    assert train.main([*config, "--workdir", str(work), *flags]) == 0
    shown = capsys.readouterr().out
    assert "renamed 6.bad" in shown and "going on from step 4" in shown
    assert (work / "checkpoints" / "6.bad").exists() and (work / "checkpoints" / "6").exists()
    assert timeless(work) == timeless(tmp_path / "straight")
    for file in sorted((tmp_path / "straight" / "export").iterdir()):
        if file.name == CARD:
            continue  # it names its run
        assert (work / "export" / file.name).read_bytes() == file.read_bytes(), file.name
