"""FLOPs of an autoencoder's step, against those of its forward pass."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.config import load_config
from jaxft.core.params import bind, describe
from jaxft.models.flops import count
from jaxft.runs.opening import open_run
from jaxft.tasks import OPTIONS
from tests.tiny_autoencoders import SIZE, make_vae


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = make_vae(tmp_path_factory.mktemp("vae"))
    keys = {"model": str(model), "resolution": str(SIZE), "loss.perceptual": "0.0", "data.eval": ""}
    config = load_config("configs/autoencoder.py", [list(one) for one in keys.items()], OPTIONS)
    return open_run(config)


def test_a_step_of_all_parameters_has_three_times_the_flops_of_its_forward_pass(run):
    objective = run.task.objective(run.opened, run.task.plan(run.opened))
    template = run.opened.template
    params = {k: jax.ShapeDtypeStruct(x.shape, jnp.float32) for k, x in describe(template).items()}
    pixels = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)

    def forward(params, pixels):
        keys = jax.random.split(jax.random.key(0), 1)
        return objective.reconstruct(bind(template, params).vae, pixels, keys, "none").images

    once = count(forward, params, pixels)
    first = 2 * 9 * SIZE**2 * 3 * 8  # needs no gradient of the pixels
    again = 2 * 2 * (SIZE // 2) ** 4 * 16  # scores of both attentions, once more in backward
    assert objective.flops(run.leaves) == pytest.approx(3 * once - first + again, rel=1e-3)
    assert once < objective.flops(run.trained_leaves) < 2.5 * once, "the decoder alone trains"
