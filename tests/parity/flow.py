"""Pipelines of flow matching beside diffusers', for the tests of each of them."""

from itertools import starmap

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxft.core.params import bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import Guidance, generate
from jaxft.tasks.diffusion.captions import load_captions
from jaxft.weights import transfer
from tests import plain_torch
from tests.parity import test_diffusion_training as steps
from tests.tiny_diffusion import make_config

PROMPTS = ["a red fish", "two birds by the sea, far away"]


class Both:
    """A diffusers pipeline, and what jaxft reads of its folder."""

    def __init__(self, work, pipe):
        self.pipe, self.folder = pipe, work / "folder"
        pipe.save_pretrained(self.folder)
        pipeline = open_model(str(self.folder))
        self.cfg = families.read_config(pipeline)
        self.template = jax.eval_shape(lambda k: families.build(self.cfg, k), jax.random.key(0))
        self.captions = load_captions(pipeline, self.cfg.texts)
        leaves, self.params = describe(self.template), {}
        places = shardings(leaves, one_device_mesh())
        for part in families.parts(pipeline, self.cfg):
            own = {path for path in leaves if path.startswith(part.prefix)}
            self.params |= transfer.load(part, leaves, places, jnp.float32, own)

    def ids(self, prompts):
        return np.stack([self.captions(prompt) for prompt in prompts])


def scaled(pipe, posterior, eps):
    drawn, config = posterior.mean + posterior.std * eps, pipe.vae.config
    return (drawn - config.shift_factor) * config.scaling_factor


def draw(one, noise, guidance):
    """Texts of PROMPTS and of "", and pictures of four steps of Euler's method."""

    @jax.jit
    def run(params):
        model = bind(one.template, params)
        text, null = (
            model.encode_text(jnp.asarray(one.ids(captions)), dtype=jnp.float32)
            for captions in (PROMPTS, ["", ""])
        )
        sampler = one.cfg.process().sampler("euler", 4, noise.shape[1:3])
        scale = Guidance(guidance)
        return text, null, generate(model, one.cfg, text, null, noise, sampler, scale, jnp.float32)

    return run(one.params)


class Oracle(steps.Oracle):
    """diffusers' trainers of flow matching, with drawn sigmas, and "" for dropped captions.

    targets: the modules of the transformer with a LoRA, for PEFT. encode: captions to embeddings.
    velocity: of noisy latents [B, C, Y, X], their sigmas and these embeddings. scaled: latents of
    a posterior and unit noise.
    """

    def __init__(self, pipe, run, before, targets, encode, velocity, scaled=scaled):
        names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        self.pipe, self.run, self.encode, self.velocity = pipe, run, encode, velocity
        self.scaled = scaled
        modules = {n: getattr(pipe, n, None) for n in names}
        self.modules = {n: module for n, module in modules.items() if module is not None}
        if run.cfg.lora.rank:
            config = steps.LoraConfig(
                r=run.cfg.lora.rank, lora_alpha=run.cfg.lora.alpha, target_modules=targets
            )
            steps.inject_adapter_in_model(config, pipe.transformer)
        for module in self.modules.values():
            module.double()
        self.tensors = {f"{n}.{k}": p for n, m in self.modules.items() for k, p in steps.all_of(m)}
        trained = {
            key
            for key in self.tensors
            if key.startswith("transformer.") and (".lora_" in key or not run.cfg.lora.rank)
        }
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                tensor.requires_grad_(key in trained)
                if ".lora_" in key:
                    tensor.copy_(torch.tensor(before[key]))
        self.trained = {key: self.tensors[key] for key in sorted(trained)}

    def loss(self, step, batch):
        eps, noise, sigma, dropped = steps.draws(self.run, step, batch)
        sigma = sigma.double()
        posterior = self.pipe.vae.encode(steps.to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        latents = self.scaled(self.pipe, posterior, eps)
        share = sigma[:, None, None, None]
        captions = [self.captions[int(i)] for i in batch["sample_ids"]]
        words = ["" if lost else one for one, lost in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            text = self.encode(self.pipe, words)
        out = self.velocity(self.pipe, (1 - share) * latents + share * noise, sigma, *text)
        return ((out - (noise - latents)) ** 2).mean()

    def train(self, batches):
        rows = self.run.train
        self.captions = [rows.caption(i) for i in range(len(rows))]
        losses = starmap(self.loss, enumerate(batches))
        made = plain_torch.train(self.trained.values(), losses, lr=steps.LR, decay=steps.DECAY)
        return made, {key: p.detach().numpy() for key, p in self.trained.items()}


def trained(folder, pictures, changes, mesh, work, patch):
    """Five steps of ours on a mesh of steps.MESHES: steps.Trained."""
    if mesh == "one":
        patch.setattr(jax, "device_count", lambda *_: 1)
    sizes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), steps.MESHES[mesh] or (), strict=False)
    config = make_config(folder, pictures, {**steps.COMMON, **changes, **dict(sizes)})
    return steps.jax_steps(config, work)


def assert_equals_torch(ours, oracle, blind=r"(?!)"):
    """Losses, updates and what does not train. blind: tensors whose gradient is rounding."""
    losses, theirs = oracle.train(ours.batches)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    moved = {key: x for key, x in theirs.items() if not steps.re.fullmatch(blind, key)}
    steps.assert_same_updates(ours.before, ours.after, moved)
    still = ours.before.keys() - theirs.keys()
    assert still and all(np.array_equal(ours.before[key], ours.after[key]) for key in still)
    return still
