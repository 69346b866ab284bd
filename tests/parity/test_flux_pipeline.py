"""FLUX.1 as a whole against diffusers': texts, pictures, training."""

from itertools import starmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import jaxft
from jaxft.core.params import bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.pipelines import families
from jaxft.models.pipelines.flow.flux import TRAIN_GUIDANCE
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import Guidance, generate
from jaxft.tasks.diffusion.captions import load_captions
from jaxft.weights import transfer
from tests import plain_torch
from tests.parity import test_diffusion_training as steps
from tests.tiny_diffusion import make_config, make_pictures
from tests.tiny_flux import LENGTHS, make_flux

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["a red fish", "two birds by the sea, far away"]


class Both:
    """A diffusers pipeline, and what jaxft reads of its folder."""

    def __init__(self, work, kind):
        self.pipe, self.tokens = make_flux(work, kind), LENGTHS[kind]
        self.folder = work / "folder"
        self.pipe.save_pretrained(self.folder)
        pipeline = open_model(str(self.folder))
        self.cfg = families.read_config(pipeline)
        self.template = jax.eval_shape(lambda k: families.build(self.cfg, k), jax.random.key(0))
        self.captions = load_captions(pipeline, self.cfg.texts)
        leaves, self.params = describe(self.template), {}
        places = shardings(leaves, one_device_mesh())
        for part in families.parts(pipeline, self.cfg):
            own = {path for path in leaves if path.startswith(part.prefix)}
            self.params |= transfer.load(part, leaves, places, jnp.float32, own)

    def texts(self, prompts):
        with torch.no_grad():
            return self.pipe.encode_prompt(prompts, device="cpu", max_sequence_length=self.tokens)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = Both(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", LENGTHS)
def test_t06_t21_texts_and_pictures_are_those_of_the_pipeline(both, kind):
    """dev has a shift by tokens and guidance 3.5. schnell has neither, and 256 tokens for T5."""
    one = both(kind)
    noise = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)
    ids = np.stack([one.captions(prompt) for prompt in PROMPTS])
    how = Guidance(one.cfg.drawing.guidance)

    @jax.jit
    def draw(params):
        model = bind(one.template, params)
        text = model.encode_text(jnp.asarray(ids), dtype=jnp.float32)
        sampler = one.cfg.process().sampler("euler", 4, noise.shape[1:3])
        return text, generate(model, one.cfg, text, text, noise, sampler, how, jnp.float32)

    text, made = draw(one.params)
    context, pooled, _ = one.texts(PROMPTS)
    assert text.context.shape == (2, one.tokens, 48)
    np.testing.assert_allclose(text.context, context, atol=1e-4)  # sums over 512 keys
    np.testing.assert_allclose(text.pooled, pooled, atol=2e-5)
    latents = FluxPipeline._pack_latents(torch.tensor(noise).permute(0, 3, 1, 2), 2, 4, 6, 8)
    drawn = one.pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=how.scale, height=12, width=16,
        max_sequence_length=one.tokens, latents=latents, output_type="pt",
    ).images  # fmt: skip
    np.testing.assert_allclose(made / 2 + 0.5, drawn.permute(0, 2, 3, 1), atol=1e-4)
    assert drawn.std() > 0.01


def test_t18_guidance_is_an_input_of_dev_alone_and_costs_no_second_pass(both):
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)

    def picture(one, scale):
        def draw(params):
            model = bind(one.template, params)
            text = model.encode_text(jnp.asarray(one.captions("bread"))[None], dtype=jnp.float32)
            sampler = one.cfg.process().sampler("euler", 1, (4, 4))
            how = Guidance(scale)
            return generate(model, one.cfg, text, None, noise, sampler, how, jnp.float32)

        return np.asarray(jax.jit(draw)(one.params))

    dev, schnell = both("dev"), both("schnell")
    assert np.abs(picture(dev, 1.0) - picture(dev, 3.5)).max() > 1e-4
    np.testing.assert_array_equal(picture(schnell, 1.0), picture(schnell, 3.5))


def test_defaults_and_description_are_those_of_the_kind(both):
    dev, schnell = both("dev").cfg, both("schnell").cfg
    assert dev.drawing == (28, 3.5) and schnell.drawing == (4, 0.0)
    assert dev.describe() == "FLUX.1 with guidance as an input, flow matching"
    assert "distilled to 4 steps" in schnell.describe() and "\n" not in schnell.describe()


@pytest.mark.parametrize("kind", LENGTHS)
def test_it_loads_as_a_python_object(both, kind):
    one = both(kind)
    loaded = jaxft.load(str(one.folder))
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    sigma = np.array([0.9, 0.25], np.float32)
    made = loaded(jnp.asarray(latents), jnp.asarray(sigma), PROMPTS)
    channels_first = torch.tensor(latents).permute(0, 3, 1, 2)
    with torch.no_grad():
        context, pooled, _ = one.texts(PROMPTS)
        wanted = velocity(one.pipe, channels_first, torch.tensor(sigma), context, pooled)
    np.testing.assert_allclose(made, wanted.permute(0, 2, 3, 1), atol=5e-5)
    pictures = loaded.sample(PROMPTS, steps=2, size=16)
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 1


def velocity(pipe, latents, sigma, context, pooled, guidance=TRAIN_GUIDANCE):
    """diffusers' transformer on latents [B, C, Y, X], packed as the pipeline packs them."""
    rows, channels, y, x = latents.shape
    takes = pipe.transformer.config.guidance_embeds
    out = pipe.transformer(
        FluxPipeline._pack_latents(latents, rows, channels, y, x),
        timestep=sigma,
        guidance=torch.full_like(sigma, guidance) if takes else None,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, y // 2, x // 2, "cpu", context.dtype),
    ).sample
    return FluxPipeline._unpack_latents(out, 2 * y, 2 * x, 2)


class Oracle(steps.Oracle):
    """diffusers' train_dreambooth_flux, with drawn sigmas: velocities, and "" for dropped texts."""

    def __init__(self, pipe, run, before, tokens):
        names = ("transformer", "vae", "text_encoder", "text_encoder_2")
        self.pipe, self.run, self.tokens = pipe, run, tokens
        self.modules = {n: getattr(pipe, n) for n in names}
        if run.cfg.lora.rank:
            config = steps.LoraConfig(
                r=run.cfg.lora.rank, lora_alpha=run.cfg.lora.alpha, target_modules=PEFT
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
        vae = self.pipe.vae
        posterior = vae.encode(steps.to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        drawn = posterior.mean + posterior.std * eps
        latents = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
        share = sigma.double()[:, None, None, None]
        captions = [self.captions[int(i)] for i in batch["sample_ids"]]
        words = ["" if lost else one for one, lost in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            context, pooled, _ = self.pipe.encode_prompt(
                words, device="cpu", max_sequence_length=self.tokens
            )
        noisy = (1 - share) * latents + share * noise
        out = velocity(self.pipe, noisy, sigma.double(), context, pooled)
        return ((out - (noise - latents)) ** 2).mean()

    def train(self, batches):
        rows = self.run.train
        self.captions = [rows.caption(i) for i in range(len(rows))]
        losses = starmap(self.loss, enumerate(batches))
        made = plain_torch.train(self.trained.values(), losses, lr=steps.LR, decay=steps.DECAY)
        return made, {key: p.detach().numpy() for key, p in self.trained.items()}


# The targets of diffusers' train_dreambooth_lora_flux: ends of names, so single blocks are in.
PEFT = [
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
LORA = {"lora.rank": 4, "lora.alpha": 6.0}  # with the default targets
CASES = {"full": ("dev", {"micro_batches": 2}), "lora": ("schnell", LORA)}


@pytest.mark.parametrize(("case", "mesh"), [("full", "2x2x2"), ("lora", "one")])
def test_five_steps_equal_torch(both, tmp_path, capfd, monkeypatch, case, mesh):
    kind, changes = CASES[case]
    one, data = both(kind), make_pictures(tmp_path / "pictures")
    if mesh == "one":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    sizes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), steps.MESHES[mesh] or (), strict=False)
    config = make_config(one.folder, data, {**steps.COMMON, **changes, **dict(sizes)})
    ours = steps.jax_steps(config, tmp_path)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    pipe = FluxPipeline.from_pretrained(one.folder)
    oracle = Oracle(pipe, ours.run, ours.before, one.tokens)
    losses, theirs = oracle.train(ours.batches)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    steps.assert_same_updates(ours.before, ours.after, theirs)
    still = ours.before.keys() - theirs.keys()
    assert still and all(np.array_equal(ours.before[key], ours.after[key]) for key in still)
