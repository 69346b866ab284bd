"""Five AdamW steps of jaxft against plain torch over diffusers, transformers and peft."""

import re
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model

from jaxft.core.sharding import local_rows, place_batch
from jaxft.core.step import sample_keys
from jaxft.noise.process import offset_noise
from jaxft.objectives import denoising as diffusion
from jaxft.runs.checkpoint import Checkpoints
from jaxft.weights import transfer
from jaxft.weights.adapters import pipeline as pipeline_lora
from tests import plain_torch
from tests import whole as runs
from tests.tiny_diffusion import make_config, make_pictures
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STEPS, LR, DECAY = 5, 1e-3, 0.1
COMMON = {"optim.weight_decay": DECAY, "optim.lr": LR, "caption_dropout": 0.3}
ADAPT = r"unet\..*(attn[12]\.to_(q|k|v|out)|ff\.proj|conv1|conv_in|proj_in|upsamplers\.0\.conv)"
PEFT = r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.0\.proj|conv1|conv_in|proj_in|upsamplers\.0\.conv)"
LORA = {"trainable": "", "lora.rank": 4, "lora.alpha": 6.0, "lora.targets": ADAPT}
TEXTS = {"trainable": r"unet\..*|text_encoder.*"}
HARD = {"min_snr_gamma": 5.0, "noise_offset": 0.1}
CASES = {
    # family, prediction, changes
    "unet": ("sd", "epsilon", HARD),
    "text": ("sd", "v_prediction", {"micro_batches": 2, **HARD, **TEXTS}),
    "xl-text": ("sdxl", "epsilon", {"min_snr_gamma": 0.0, **TEXTS}),
    "lora": ("sd", "epsilon", {**HARD, **LORA}),
    "dora": ("sd", "epsilon", {**HARD, **LORA, "lora.dora": True}),
    "lokr": ("sd", "epsilon", {**HARD, **LORA, "lora.rank": 1, "lora.lokr": 4}),
    "xl-lora": ("sdxl", "v_prediction", {"min_snr_gamma": 0.0, "micro_batches": 2, **LORA}),
}
MESHES = {"one": None, "data8": (8, 1, 1), "fsdp8": (1, 8, 1), "2x2x2": (2, 2, 2)}
# A key's bias adds the same to all logits of a query, and softmax takes that out: its gradient is
# zero, and what Adam makes of it is rounding.
BLIND = re.compile(r"text_encoder.*\.k_proj\.bias")
# SDXL reads the last but one layer of its first encoder.
BESIDE = r"\.inversion\.|\.lora_k$"  # that torch has no name for
UNREAD = re.compile(r"text_encoder\.(encoder\.layers\.1|final_layer_norm)\..*")


class Trained(NamedTuple):
    """Five steps of jaxft; parameters under torch's names."""

    run: Any
    batches: list
    losses: list
    before: dict
    after: dict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """(torch pipeline, its folder) by (family, prediction); made once."""
    made = {}

    def get(family, prediction):
        if (family, prediction) not in made:
            work = tmp_path_factory.mktemp("pipeline")
            pipe = make_pipeline(work, family, prediction)
            pipe.save_pretrained(work / "folder")
            made[family, prediction] = work / "folder"
        return made[family, prediction]

    return get


def jax_steps(config, work):
    """A Trained: one compile for all steps."""
    run = runs.open_run(config)
    plan, saved = runs.make_plan(run), Checkpoints(work / "run")
    with jax.set_mesh(run.mesh):
        state, frozen, _ = runs.start_state(run, plan, saved, 0)
        before = {path: np.array(x) for path, x in {**frozen, **state.params}.items()}
        stream = run.train.batches(0, local_rows(run.mesh, run.cfg.batch_size))
        batches, losses = [next(stream) for _ in range(STEPS)], []
        placed = [place_batch(batch, run.mesh) for batch in batches]
        lowered = runs.make_step(run, plan).lower(state, frozen, placed[0])
        step_fn = lowered.compile(compiler_options=QUICK)  # refuses what would need another
        for batch in placed:
            state, sums = step_fn(state, frozen, batch)
            losses.append(float(sums["loss"]))
        after = {path: np.array(x) for path, x in {**frozen, **state.params}.items()}
    return Trained(run, batches, losses, named(run, before), named(run, after))


@pytest.fixture(scope="module")
def trained(pipelines, pictures, tmp_path_factory):
    """`trained(case, mesh)`: a Trained, made once."""
    made = {}

    def get(case, mesh):
        family, prediction, changes = CASES[case]
        sizes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), MESHES[mesh] or (), strict=False)
        changes = {**COMMON, **changes, **dict(sizes)}
        config = make_config(pipelines(family, prediction), pictures, changes)
        with pytest.MonkeyPatch.context() as patch:
            if mesh == "one":
                patch.setattr(jax, "device_count", lambda *_: 1)
            made[case, mesh] = jax_steps(config, tmp_path_factory.mktemp("run"))
        assert made[case, mesh].run.mesh.size == (1 if mesh == "one" else 8)
        return made[case, mesh]

    return lambda case, mesh: made.get((case, mesh)) or get(case, mesh)


def named(run, params):
    """Parameters under torch's names, `component.key`; adapters as peft calls them."""
    made = {}
    for part in run.opened.parts:
        plain = {p: jnp.asarray(x) for p, x in params.items() if ".lora_" not in p}
        for key, tensor in transfer.export(part, run.leaves, plain, {}, None).tensors:
            made[part.prefix + key.removeprefix("text_model.")] = np.array(tensor)
    for site in pipeline_lora.sites(run.opened.parts, run.leaves):
        a, b, m = site.factors(params)
        made[f"{site.name}.lora_A.default.weight"] = a
        made[f"{site.name}.lora_B.default.weight"] = b
        if m is not None:
            norms = m if b.ndim == 2 else m.reshape(1, -1, 1, 1)
            made[f"{site.name}.lora_magnitude_vector.default.weight"] = norms
    return made | {p: np.array(x) for p, x in params.items() if re.search(BESIDE, p)}


def draws(run, step, batch):
    """What is random in a step, from the same key streams, as torch tensors."""
    keys = sample_keys(run.cfg.seed, step, batch["sample_ids"])
    stream, options = partial(diffusion.stream, keys), run.opened.options
    side = options.resolution // run.opened.model_cfg.vae.factor
    shape = (side, side, run.opened.model_cfg.vae.latent_channels)
    noise = diffusion.normal(stream(diffusion.NOISE), shape)
    if options.noise_offset:
        noise = offset_noise(stream(diffusion.OFFSET), noise, options.noise_offset)
    uniform = jax.vmap(jax.random.uniform)(stream(diffusion.DROP))
    return (
        to_torch(diffusion.normal(stream(diffusion.LATENT), shape)),
        to_torch(noise),
        torch.tensor(np.array(run.opened.process.draw_times(stream(diffusion.TIME), shape[:2]))),
        torch.tensor(np.array(uniform < options.caption_dropout)),
    )


def to_torch(x):
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


class Oracle:
    """A training of the components of a torch pipeline, as diffusers' example scripts have it.

    In fp64: Adam divides by the size of a gradient, so that two fp32 loops differ in those of
    nearly nothing.
    """

    def __init__(self, pipe, run, before):
        self.pipe, self.run, self.xl = pipe, run, hasattr(pipe, "text_encoder_2")
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        self.modules = {n: getattr(pipe, n) for n in names if getattr(pipe, n, None) is not None}
        if run.cfg.lora.rank:
            own = run.cfg.lora
            config = LoraConfig(
                r=own.rank, lora_alpha=own.alpha, target_modules=PEFT, use_dora=own.dora
            )
            inject_adapter_in_model(config, pipe.unet)
        for module in self.modules.values():
            module.double()
        self.tensors = {f"{n}.{k}": p for n, m in self.modules.items() for k, p in all_of(m)}
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                if ".lora_" in key:
                    tensor.copy_(torch.tensor(before[key]))
        trained = {n.partition(".")[0] for n in run.chosen}
        self.trained = {
            key: tensor.requires_grad_(key.partition(".")[0] in trained)
            for key, tensor in self.tensors.items()
            if key.partition(".")[0] in trained and (".lora_" in key or not run.cfg.lora.rank)
        }
        for key, tensor in self.tensors.items():
            tensor.requires_grad_(key in self.trained)
        # The tables of diffusers are fp32 cumulative products; the reference is their definition.
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas), dtype=torch.float64)

    def encode(self, ids):
        ids = torch.tensor(ids).long()
        first = self.pipe.text_encoder(ids[:, 0], output_hidden_states=True)
        if not self.xl:
            return first.last_hidden_state, None
        second = self.pipe.text_encoder_2(ids[:, 1], output_hidden_states=True)
        both = [first.hidden_states[-2], second.hidden_states[-2]]
        return torch.cat(both, dim=-1), second.text_embeds

    def text(self, batch, dropped):
        context, pooled = self.encode(batch["ids"])
        if self.xl:
            null, null_pooled = torch.zeros_like(context), torch.zeros_like(pooled)
            pooled = torch.where(dropped[:, None], null_pooled, pooled)
        else:
            null = self.encode(self.run.opened.captions("")[None])[0]
        return torch.where(dropped[:, None, None], null, context), pooled

    def loss(self, step, batch):
        task = self.run
        eps, noise, t, dropped = draws(self.run, step, batch)
        posterior = self.pipe.vae.encode(to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        latents = (posterior.mean + posterior.std * eps) * self.pipe.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, t)
        context, pooled = self.text(batch, dropped)
        added = {"text_embeds": pooled, "time_ids": torch.tensor(batch["time_ids"])}
        out = self.pipe.unet(noisy, t, context, added_cond_kwargs=added if self.xl else None).sample
        epsilon = task.opened.model_cfg.schedule.prediction == "epsilon"
        velocity = self.scheduler.get_velocity(latents, noise, t)
        errors = ((out - (noise if epsilon else velocity)) ** 2).mean(dim=(1, 2, 3))
        if gamma := task.opened.options.min_snr_gamma:
            bar = self.scheduler.alphas_cumprod[t]
            snr = bar / (1 - bar)
            errors = errors * (snr.clamp(max=gamma) / (snr if epsilon else snr + 1))
        return errors.mean()

    def train(self, batches):
        losses = starmap(self.loss, enumerate(batches))
        made = plain_torch.train(self.trained.values(), losses, lr=LR, decay=DECAY)
        return made, {key: p.detach().numpy() for key, p in self.trained.items()}


def all_of(module):
    """Parameters under the names that jaxft exports; a peft layer's own kernel as without it."""
    for key, tensor in module.named_parameters():
        yield key.replace(".base_layer", "").removeprefix("text_model."), tensor


def assert_same_updates(before, after, theirs, tolerance=1e-3):
    """Every tensor's update equals the other one within `tolerance` of that update's norm.

    BLIND ones, whose gradient is zero, stay below a hundredth of what Adam moves others.
    """
    worst = {}
    for key in theirs:
        ours, wanted = after[key] - before[key], theirs[key] - before[key]
        norm, most = np.linalg.norm(wanted), STEPS * LR * np.sqrt(wanted.size)
        if BLIND.fullmatch(key):
            assert max(norm, np.linalg.norm(ours)) < 1e-2 * most, key
        elif not norm:
            assert UNREAD.fullmatch(key) and not np.any(ours), f"{key} does not train"
        else:
            worst[key] = np.linalg.norm(ours - wanted) / norm
    bad = {key: f"{error:.1e}" for key, error in worst.items() if not error < tolerance}
    assert not bad
    print(f"{len(worst)} tensors, worst update {max(worst.values()):.1e}")


def loaded(folder, family):
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    return cls.from_pretrained(folder)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("text", "2x2x2"),
        ("xl-lora", "one"),
        slow("text", "one"),
        slow("unet", "one"),
        slow("xl-text", "one"),
        slow("lora", "one"),
        slow("dora", "one"),
    ],
)
def test_five_steps_equal_torch(pipelines, trained, capfd, case, mesh):
    ours = trained(case, mesh)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    family, prediction, _ = CASES[case]
    oracle = Oracle(loaded(pipelines(family, prediction), family), ours.run, ours.before)
    losses, theirs = oracle.train(ours.batches)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    assert_same_updates(ours.before, ours.after, theirs)
    still = ours.before.keys() - theirs.keys()
    assert still and all(np.array_equal(ours.before[key], ours.after[key]) for key in still)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data8", "2x2x2"])
def test_meshes_train_lokr_as_one_device(trained, mesh):
    alone, ours = trained("lokr", "one"), trained("lokr", mesh)
    np.testing.assert_allclose(ours.losses, alone.losses, rtol=1e-5)
    moved = {key: x for key, x in alone.after.items() if not np.array_equal(x, alone.before[key])}
    assert moved and all(".lora_" in key for key in moved)
    assert_same_updates(ours.before, ours.after, moved)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data8", "fsdp8", "2x2x2"])
def test_meshes_equal_one_device(trained, capfd, mesh):
    alone, ours = trained("unet", "one"), trained("unet", mesh)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(ours.losses, alone.losses, rtol=1e-5)
    moved = {key: x for key, x in alone.after.items() if not np.array_equal(x, alone.before[key])}
    assert moved.keys() == {key for key in alone.after if key.startswith("unet.")}
    assert_same_updates(ours.before, ours.after, moved)
