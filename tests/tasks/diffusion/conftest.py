"""Tiny pipelines, pictures and opened runs for the tests of the diffusion task."""

import jax
import pytest

from tests import whole as runs
from tests.tiny_diffusion import make_config, make_pictures
from tests.tiny_pipelines import make_pipeline

SIZES = ((24, 20), (16, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("pipeline")
    make_pipeline(work, "sdxl").save_pretrained(work / "folder")
    return work / "folder"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same of Stable Diffusion 1."""
    work = tmp_path_factory.mktemp("pipeline")
    make_pipeline(work, "sd").save_pretrained(work / "folder")
    return work / "folder"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), 12, SIZES)


@pytest.fixture(scope="module")
def opened(folder, pictures):
    """`opened(changes)`: (run, its parameters) on one device; parameters are read once."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda *_: 1)

        def make(changes):
            run = runs.open_run(make_config(folder, pictures, changes))
            if not kept:
                with jax.set_mesh(run.mesh):
                    kept.update(runs.load_params(run))
            return run, dict(kept)

        yield make
