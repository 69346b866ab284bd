"""kid-lite0: distance of two sets of pictures by the features of EfficientNet-Lite0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.demo import demo_path
from jaxft.models.critics import efficientnet
from jaxft.models.critics.efficientnet import EfficientNetLite0
from jaxft.models.critics.perceptual import DEMO
from jaxft.nn.pixels import to_float
from jaxft.tasks.common.image_metrics import kid
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.transfer import Part

KID_ROWS = 16  # images at a time


class KidLite0:
    """Distance of two sets of pictures, with the network on the first device.

    The network does not belong to a run's parameters.
    """

    def __init__(self) -> None:
        self.template = jax.eval_shape(lambda k: EfficientNetLite0(key=k), jax.random.key(0))
        leaves = describe(self.template)
        folder = demo_path(DEMO, "perceptual")
        assert folder is not None
        rules, ignore = efficientnet.RULES, efficientnet.IGNORE
        part = Part("", str(folder), TensorFiles.open(folder), rules, efficientnet.SIZES, ignore)
        self.mesh = one_device_mesh()
        places = shardings(leaves, self.mesh)
        with jax.set_mesh(self.mesh):  # the run's mesh may have many devices
            self.params = transfer.load(part, leaves, places, jnp.float32, set(leaves))

    def __call__(
        self, reference: UInt8[np.ndarray, "N Y X 3"], made: UInt8[np.ndarray, "M Y X 3"]
    ) -> float:
        """Return the unbiased squared MMD: 0 for alike sets, below 0 by chance."""
        return kid(self.features(reference), self.features(made))

    def features(self, pictures: UInt8[np.ndarray, "N Y X 3"]) -> np.ndarray:
        """Return pooled features [N, 1280]."""
        parts = []
        for first in range(0, len(pictures), KID_ROWS):
            rows = pictures[first : first + KID_ROWS]
            padded = np.concatenate([rows, np.repeat(rows[-1:], KID_ROWS - len(rows), axis=0)])
            with jax.set_mesh(self.mesh):
                pooled = self._pooled(self.params, padded)
            parts.append(np.asarray(pooled)[: len(rows)])
        return np.concatenate(parts)

    @partial(jax.jit, static_argnums=0)
    def _pooled(self, params: Params, pictures: jax.Array) -> jax.Array:
        return bind(self.template, params).pooled(to_float(pictures))
