"""Stable Diffusion 3 as a whole against diffusers': texts, pictures, training, exports."""

from itertools import starmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import jaxft
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.pipelines import families
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import Guidance, generate
from jaxft.tasks.diffusion.captions import load_captions
from jaxft.weights import transfer
from tests import plain_torch
from tests.parity import test_diffusion_training as steps
from tests.tiny_diffusion import make_config, make_pictures
from tests.tiny_sd3 import NO_T5, make_sd3

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["a red fish", "two birds by the sea, far away"]
T5 = {"t5": {}, "no-t5": NO_T5}


class Both:
    """A diffusers pipeline, and what jaxft reads of its folder."""

    def __init__(self, work, t5):
        self.pipe = make_sd3(work, t5)
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

    def ids(self, prompts):
        return np.stack([self.captions(prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Both(tmp_path_factory.mktemp(name), name == "t5")
        return made[name]

    return get


@pytest.mark.parametrize("name", T5)
def test_t12_t13_texts_and_pictures_are_those_of_the_pipeline(both, name):
    """T5: its two shifts are in the sampler, too."""
    one = both(name)
    noise = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)

    @jax.jit
    def draw(params):
        model = bind(one.template, params)
        text, null = (
            model.encode_text(jnp.asarray(one.ids(captions)), dtype=jnp.float32)
            for captions in (PROMPTS, ["", ""])
        )
        sampler = one.cfg.process().sampler("euler", 4, noise.shape[1:3])
        made = generate(model, one.cfg, text, null, noise, sampler, Guidance(4.0), jnp.float32)
        return text, null, made

    text, null, made = draw(one.params)
    with torch.no_grad():
        wanted = one.pipe.encode_prompt(PROMPTS, None, None, device="cpu")
    assert text.context.shape == (2, 77 + 256, 48)
    for found, oracle in (
        (text.context, wanted[0]), (null.context, wanted[1]),
        (text.pooled, wanted[2]), (null.pooled, wanted[3]),
    ):  # fmt: skip
        np.testing.assert_allclose(found, oracle, atol=2e-5)
    drawn = one.pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=4.0, height=12, width=16,
        latents=torch.tensor(noise).permute(0, 3, 1, 2), output_type="pt",
    ).images  # fmt: skip
    np.testing.assert_allclose(made / 2 + 0.5, drawn.permute(0, 2, 3, 1), atol=5e-5)


def test_it_loads_as_a_python_object(both):
    one = both("no-t5")
    loaded = jaxft.load(str(one.folder))
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    made = loaded(jnp.asarray(latents), jnp.array([0.9, 0.25]), PROMPTS)
    with torch.no_grad():
        context, _, pooled, _ = one.pipe.encode_prompt(PROMPTS, None, None, device="cpu")
        wanted = one.pipe.transformer(
            torch.tensor(latents).permute(0, 3, 1, 2),
            timestep=torch.tensor([900.0, 250.0]),
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
    np.testing.assert_allclose(made, wanted.permute(0, 2, 3, 1), atol=2e-5)
    pictures = loaded.sample(PROMPTS, steps=2)
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 1
    with pytest.raises(UserError, match="sampler='ddim' is not one of euler, dpm"):
        loaded.sample(PROMPTS, sampler="ddim")


class Oracle(steps.Oracle):
    """diffusers' train_dreambooth_sd3, with drawn sigmas: velocities, and "" for dropped texts."""

    def __init__(self, pipe, run, before):
        names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        self.pipe, self.run = pipe, run
        self.modules = {n: getattr(pipe, n) for n in names if getattr(pipe, n) is not None}
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

    def text(self, batch, dropped):
        captions = [self.captions[int(i)] for i in batch["sample_ids"]]
        words = ["" if lost else one for one, lost in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            made = self.pipe.encode_prompt(
                words, None, None, device="cpu", do_classifier_free_guidance=False
            )
        return made[0], made[2]

    def loss(self, step, batch):
        eps, noise, sigma, dropped = steps.draws(self.run, step, batch)
        vae, sigma = self.pipe.vae, sigma.double()
        posterior = vae.encode(steps.to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        drawn = posterior.mean + posterior.std * eps
        latents = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
        share = sigma[:, None, None, None]
        context, pooled = self.text(batch, dropped)
        out = self.pipe.transformer(
            (1 - share) * latents + share * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
        return ((out - (noise - latents)) ** 2).mean()

    def train(self, batches):
        rows = self.run.train
        self.captions = [rows.caption(i) for i in range(len(rows))]
        losses = starmap(self.loss, enumerate(batches))
        made = plain_torch.train(self.trained.values(), losses, lr=steps.LR, decay=steps.DECAY)
        return made, {key: p.detach().numpy() for key, p in self.trained.items()}


PEFT = r"transformer_blocks\.\d+\.attn2?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
LORA = {"lora.rank": 4, "lora.alpha": 6.0}  # with the default targets
CASES = {"full": ("t5", {"micro_batches": 2}), "lora": ("no-t5", LORA)}


@pytest.mark.parametrize(("case", "mesh"), [("full", "2x2x2"), ("lora", "one")])
def test_five_steps_equal_torch(both, tmp_path, capfd, monkeypatch, case, mesh):
    name, changes = CASES[case]
    one, data = both(name), make_pictures(tmp_path / "pictures")
    if mesh == "one":
        monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    sizes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), steps.MESHES[mesh] or (), strict=False)
    config = make_config(one.folder, data, {**steps.COMMON, **changes, **dict(sizes)})
    ours = steps.jax_steps(config, tmp_path)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    pipe = StableDiffusion3Pipeline.from_pretrained(one.folder, **T5[name])
    oracle = Oracle(pipe, ours.run, ours.before)
    losses, theirs = oracle.train(ours.batches)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    moved = {key: x for key, x in theirs.items() if not BLIND.fullmatch(key)}
    steps.assert_same_updates(ours.before, ours.after, moved)
    still = ours.before.keys() - theirs.keys()
    assert still and all(np.array_equal(ours.before[key], ours.after[key]) for key in still)
    constant = "transformer.pos_embed.pos_embed"
    assert constant in still, "t7: the table of positions never trains"


# A key's bias and, in the last block, the queries of the text have a gradient of zero (t10).
BLIND = steps.re.compile(
    r"transformer\.transformer_blocks\.(\d+\.attn2?\.(to_k|add_k_proj)\.bias"
    r"|2\.attn\.(add_q_proj.*|norm_added_q.*))"
)
