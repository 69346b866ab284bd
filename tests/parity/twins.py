"""A denoiser of ours and the same of diffusers, with the same weights."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxft.core import params as P
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models import registry
from jaxft.nn.conv import CONV_REMAT
from jaxft.weights import rules, transfer
from jaxft.weights.folders.diffusers import open_component

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def numpy_state(theirs):
    return {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def worst(ours, theirs):
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def moved(theirs):
    """A torch model, its norms, biases and zeros moved off one and zero."""
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return theirs.eval()


class Twin:
    """What a denoiser's config.json, its random twin in torch and its weights make of inputs.

    run: calls the twin on the inputs of ours, and returns NHWC outputs with their graph.
    """

    def __init__(self, architecture, config, theirs, run):
        self.architecture, self.theirs, self.run = architecture, theirs, run
        self.cfg = architecture.config(config, "config.json")

    @cached_property
    def template(self):
        return jax.eval_shape(lambda: self.architecture.module(self.cfg, key=jax.random.key(0)))

    @cached_property
    def params(self):
        return self.to_params(numpy_state(self.theirs))

    @property
    def table(self):
        return self.architecture.rules(self.cfg), P.describe(self.template)

    def to_params(self, state):
        """A torch state dict as parameters, through the weight table."""
        shapes, params = {key: tensor.shape for key, tensor in state.items()}, {}
        for entry in rules.plan(*self.table, shapes, {}):
            parts = [rules.to_jax(state[key], entry.layout, {}) for key in entry.keys]
            params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
        return params

    def to_state(self, params):
        """Parameters (or their gradients) under the torch names, from the parameters alone."""
        state = {}
        for entry in rules.expected(*self.table):
            array = np.asarray(params[entry.path])
            parts = array if entry.stacked else [array]
            for key, part in zip(entry.keys, parts, strict=True):
                state[key] = rules.to_torch(part, entry.layout, {})
        return state

    def ours(self, inputs, params=None, **how):
        """Our output, compiled without the compiler's optimisations."""

        def forward(params, inputs):
            return P.bind(self.template, params)(*inputs, **how)

        params = self.params if params is None else params
        return np.asarray(jax.jit(forward).lower(params, inputs).compile(QUICK)(params, inputs))

    def gradients(self, inputs, **how):
        """One forward and backward pass of ours: output and gradients by torch's names."""
        cotangent = random(*inputs[0].shape, seed=9)

        def loss(params, inputs):
            out = P.bind(self.template, params)(*inputs, **how)
            return (out * cotangent).sum(), out

        step = jax.jit(jax.grad(loss, has_aux=True)).lower(self.params, inputs).compile(QUICK)
        grads, out = step(self.params, inputs)
        return np.asarray(out), self.to_state(grads)

    def reference(self, inputs):
        """The same of the twin."""
        out = self.run(self.theirs, *inputs)
        (out * torch.from_numpy(random(*out.shape, seed=9))).sum().backward()
        grads = {k: t.grad.numpy() for k, t in self.theirs.named_parameters()}
        self.theirs.zero_grad()
        return out.detach().numpy(), grads

    def wanted(self, inputs):
        with torch.no_grad():
            return self.run(self.theirs, *inputs).numpy()


def assert_round_trip_is_bitwise(twin):
    state, back = numpy_state(twin.theirs), twin.to_state(twin.params)
    assert back.keys() == state.keys()
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)
    assert all(back[key].shape == state[key].shape for key in state)


def assert_a_sharded_folder_comes_back(twin, theirs, folder):
    """theirs: of the twin's config, in bf16. Its shards lie on a mesh of eight."""
    theirs.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    source = open_component(str(folder), "transformer")
    architecture = registry.find(source.config, "denoiser")
    assert architecture is twin.architecture
    cfg = architecture.config(source.config, "config.json")
    assert cfg == twin.cfg
    part, leaves = architecture.part(source, cfg), P.describe(twin.template)
    places = shardings(leaves, make_mesh(data=2, fsdp=4))
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    made = dict(transfer.export(part, leaves, params, {}, None).tensors)
    assert made.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert made[key].tobytes() == tensor.view(torch.int16).numpy().tobytes()


def assert_remat_changes_no_gradient(twin, inputs):
    grads = {}
    for remat in ("none", *CONV_REMAT):

        def loss(params, remat=remat):
            return jnp.square(P.bind(twin.template, params)(*inputs, remat=remat)).sum()

        grads[remat] = jax.jit(jax.grad(loss)).lower(twin.params).compile(QUICK)(twin.params)
    for remat in CONV_REMAT:
        assert max(worst(grads[remat][path], g) for path, g in grads["none"].items()) < 1e-4
