"""A denoiser of ours and the same of diffusers, with the same weights."""

from functools import cached_property

import jax
import numpy as np
import torch

from jaxft.core import params as P
from jaxft.weights import rules

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
