"""A denoiser of ours and the same of diffusers, with the same weights."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jaxft.core import params as P
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models import flops, registry
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


class ExactSinusoids(torch.nn.Module):
    """diffusers' `Timesteps`, with frequencies that are rounded to fp32 once.

    Its own are rounded three times, which is 2e-4 rad at 3500, a guidance of 3.5.
    """

    def forward(self, t):
        frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128).astype(np.float32)
        angles = t[:, None] * torch.from_numpy(frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
    def sizes(self):
        return self.architecture.sizes(self.cfg)

    @property
    def table(self):
        return self.architecture.rules(self.cfg), P.describe(self.template)

    def to_params(self, state):
        """A torch state dict as parameters, through the weight table."""
        shapes, params = {key: tensor.shape for key, tensor in state.items()}, {}
        for entry in rules.plan(*self.table, shapes, self.sizes):
            parts = [rules.to_jax(state[key], entry.layout, self.sizes) for key in entry.keys]
            params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
        return params

    def to_state(self, params):
        """Parameters (or their gradients) under the torch names, from the parameters alone."""
        state = {}
        for entry in rules.expected(*self.table):
            array = np.asarray(params[entry.path])
            parts = array if entry.stacked else [array]
            for key, part in zip(entry.keys, parts, strict=True):
                state[key] = rules.to_torch(part, entry.layout, self.sizes)
        return state

    def ours(self, inputs, params=None, **how):
        """Our output, compiled without the compiler's optimisations."""

        def forward(params, inputs):
            return P.bind(self.template, params)(*inputs, **how)

        params = self.params if params is None else params
        return np.asarray(jax.jit(forward).lower(params, inputs).compile(QUICK)(params, inputs))

    def gradients(self, inputs, **how):
        """One forward and backward pass of ours: output and gradients by torch's names."""
        template = self.template

        def loss(params, inputs):
            out = P.bind(template, params)(*inputs, **how)
            return (out * random(*out.shape, seed=9)).sum(), out

        step = jax.jit(jax.grad(loss, has_aux=True)).lower(self.params, inputs).compile(QUICK)
        grads, out = step(self.params, inputs)
        return np.asarray(out), self.to_state(grads)

    def reference(self, inputs):
        """The same of the twin."""
        out = self.run(self.theirs, *inputs)
        (out * torch.from_numpy(random(*out.shape, seed=9))).sum().backward()
        grads = {key: tensor.grad.numpy() for key, tensor in self.theirs.named_parameters()}
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
    """theirs: of the twin's config, in bf16. Its shards lie on a mesh of eight. Returns an export.

    What is a constant to training is copied from the folder, in its own dtype.
    """
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    source = open_component(str(folder), "transformer")
    architecture = registry.find(source.config, "denoiser")
    assert architecture is twin.architecture
    cfg = architecture.config(source.config, "config.json")
    assert cfg == twin.cfg
    part, leaves = architecture.part(source, cfg), P.describe(twin.template)
    places = shardings(leaves, make_mesh(data=2, fsdp=4))
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    trained = {path: array for path, array in params.items() if not leaves[path].role}
    made = dict(transfer.export(part, leaves, trained, {}, None).tensors)
    assert made.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert made[key].dtype == str(tensor.dtype).removeprefix("torch.")
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        assert made[key].tobytes() == raw.numpy().tobytes()
    return made


def assert_remat_changes_no_gradient(twin, inputs):
    grads = {}
    for remat in ("none", *CONV_REMAT):

        def loss(params, remat=remat):
            return jnp.square(P.bind(twin.template, params)(*inputs, remat=remat)).sum()

        grads[remat] = jax.jit(jax.grad(loss)).lower(twin.params).compile(QUICK)(twin.params)
    for remat in CONV_REMAT:
        assert max(worst(grads[remat][path], g) for path, g in grads["none"].items()) < 1e-4


def assert_bf16_is_as_near_as_autocast_and_sharded_rows_equal_one_device(twin, inputs):
    alone, half = twin.ours(inputs), twin.ours(inputs, dtype=jnp.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        usual = twin.run(twin.theirs, *inputs).detach().float().numpy()
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - alone).mean()
    assert error < 1.1 * np.abs(usual - alone).mean()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(twin.params, shardings(P.describe(twin.template), mesh))
        assert worst(twin.ours(inputs, placed), alone) < 1e-5


def assert_flops_are_torchs(twin, inputs, unread=0):
    """unread: FLOPs of torch whose result nothing reads."""
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter has no formula for the CPU's own kernel
    with FlopCounterMode(display=False) as counter, plain:
        twin.wanted(inputs)
    ours = flops.count(lambda model: model(*inputs), twin.template)
    assert ours == counter.get_total_flops() - unread
