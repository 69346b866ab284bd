"""Inpainting and InstructPix2Pix against plain torch over diffusers' modules and its pipelines."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image

from jaxft import sample, train
from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.core.step import sample_keys
from jaxft.data.images.dataset import fit
from jaxft.models.pipelines import conditioning as pure
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.stable_diffusion import HOLE, SOURCE, Guidance
from jaxft.noise.samplers import ddim
from jaxft.objectives import denoising as diffusion
from jaxft.tasks import Request
from jaxft.tasks.diffusion import conditioning
from tests import whole as runs
from tests.tiny_diffusion import flags_of, make_config, make_pictures
from tests.tiny_pipelines import make_pipeline

SIDE, STEPS, GUIDANCE, IMAGE_GUIDANCE = 16, 5, 3.0, 1.7
pytestmark = pytest.mark.usefixtures("quick", "one_thread")
PROMPTS = ["a red cat", "two blue birds, one of them asleep"]
KINDS = {  # channels of the UNet, diffusers' class
    HOLE: (9, StableDiffusionInpaintPipeline),
    SOURCE: (8, StableDiffusionInstructPix2PixPipeline),
}
LARGE = {
    HOLE: StableDiffusionXLInpaintPipeline,
    SOURCE: StableDiffusionXLInstructPix2PixPipeline,
}
FREE = {"requires_safety_checker": False}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """(diffusers' pipeline, its folder) by kind."""
    made = {}
    for kind, (channels, cls) in KINDS.items():
        work = tmp_path_factory.mktemp(kind)
        pipe = cls(**make_pipeline(work, "sd", in_channels=channels).components, **FREE)
        pipe.save_pretrained(work / "folder")
        made[kind] = pipe, work / "folder"
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Captioned pictures, each with a source."""
    return make_edits(tmp_path_factory.mktemp("pictures"))


def make_edits(folder, count=8, sizes=((24, 20),)):
    spec = make_pictures(folder, count)
    make_pictures(folder / "before", count, sizes, seed=1)
    metadata = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows = [{**row, "source": f"before/{row['file_name']}"} for row in rows]
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return spec


@pytest.fixture(scope="module")
def opened(pipelines, pictures):
    """`opened(kind, changes)`: (run, its parameters)."""

    def make(kind, changes=None, folder=None):
        folder = folder or pipelines[kind][1]
        run = runs.open_run(make_config(folder, pictures, changes))
        with jax.set_mesh(run.mesh):
            return run, runs.load_params(run)

    return make


def to_torch(x, dtype=torch.float32):
    return torch.tensor(np.array(x, np.float32)).permute(0, 3, 1, 2).to(dtype)


# ---- the loss -----------------------------------------------------------------------------


def their_latents(pipe, pixels, eps):
    posterior = pipe.vae.encode(pixels).latent_dist
    return (posterior.mean + posterior.std * eps) * pipe.vae.config.scaling_factor


def their_seen(kind, pipe, batch, keys, u, share):
    """The UNet's further channels, as the two training scripts of diffusers make them."""
    side, given = batch["pixels"].shape[1], partial(to_torch, dtype=pipe.unet.dtype)
    if kind == SOURCE:
        source = given(batch["source"]) / 127.5 - 1
        kept = 1 - ((u >= share).float() * (u < 3 * share).float())
        return kept.reshape(-1, 1, 1, 1) * pipe.vae.encode(source).latent_dist.mode()
    pixels = given(batch["pixels"]) / 127.5 - 1
    own = jax.vmap(jax.random.split)(diffusion.stream(keys, diffusion.PICTURE))
    mask = given(pure.random_masks(own[:, 0], (side, side)))
    assert 0 < mask.mean() < 1
    eps = given(diffusion.normal(own[:, 1], (side // 2, side // 2, 4)))
    masked = their_latents(pipe, pixels * (mask < 0.5), eps)
    small = torch.nn.functional.interpolate(mask, size=(side // 2, side // 2))
    return torch.cat([small, masked], dim=1)


def their_loss(kind, pipe, task, batch, keys, share):
    """The loss of a batch, a tensor of the pipeline's dtype."""
    stream, side = partial(diffusion.stream, keys), batch["pixels"].shape[1] // 2
    given, shape = partial(to_torch, dtype=pipe.unet.dtype), (side, side, 4)
    noise = given(diffusion.normal(stream(diffusion.NOISE), shape))
    eps = given(diffusion.normal(stream(diffusion.LATENT), shape))
    t = task.opened.process.draw_times(stream(diffusion.TIME), shape[:2])
    t = torch.tensor(np.array(t)).long()
    u = torch.tensor(np.array(jax.vmap(jax.random.uniform)(stream(diffusion.DROP))))
    latents = their_latents(pipe, given(batch["pixels"]) / 127.5 - 1, eps)
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    ids = torch.tensor(batch["ids"][:, 0]).long()
    null = pipe.text_encoder(torch.tensor(task.opened.captions("")).long()).last_hidden_state
    dropped = (u < (2 * share if kind == SOURCE else share)).reshape(-1, 1, 1)
    context = torch.where(dropped, null, pipe.text_encoder(ids).last_hidden_state)
    seen = their_seen(kind, pipe, batch, keys, u, share)
    out = pipe.unet(torch.cat([noisy, seen], dim=1), t, context).sample
    return ((out - noise) ** 2).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_plain_torch(opened, pipelines, kind):
    share = 0.2
    changes = {"caption_dropout": share, "min_snr_gamma": 0.0, "cache": ""}
    run, params = opened(kind, changes)
    batch = run.shapes(slice(0, 8))[0]
    batch["sample_ids"] = np.arange(8, dtype=np.int32)
    keys = sample_keys(0, 3, batch["sample_ids"])

    @jax.jit
    def loss(params, batch):
        total, weight = run.objective.loss(bind(run.opened.template, params), batch, keys, 0)[0]
        return total / weight

    with jax.set_mesh(run.mesh), torch.no_grad():
        ours = float(loss(params, batch))
        theirs = float(their_loss(kind, pipelines[kind][0], run, batch, keys, share))
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---- drawing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a picture and of a mask of its size, black but for a part in white."""
    work = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(work / "image.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:12, 5:16] = 255
    Image.fromarray(mask).save(work / "mask.png")
    return SimpleNamespace(image=str(work / "image.png"), mask=str(work / "mask.png"))


def without_spread(pipe):
    """A VAE whose posterior has no width: diffusers' inpainting draws from it, jaxft does not."""
    with torch.no_grad():
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -30
    return pipe


SLOW = [pytest.param("sdxl", kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize(("family", "kind"), [*(("sd", kind) for kind in KINDS), *SLOW])
def test_pictures_are_those_of_the_pipeline(opened, files, tmp_path, family, kind):
    channels, cls = KINDS[kind]
    parts = make_pipeline(tmp_path, family, in_channels=channels).components
    cls = cls if family == "sd" else LARGE[kind]
    if family == "sdxl":
        parts = {name: one for name, one in parts.items() if one is not None}
    pipe = cls(**parts, **FREE if family == "sd" else {})
    without_spread(pipe).save_pretrained(tmp_path / "folder")
    run, params = opened(kind, {"batch_size": 2}, tmp_path / "folder")
    task, cfg = run, run.opened.model_cfg
    mask = files.mask if kind == HOLE else None
    request = Request(
        steps=STEPS, guidance=GUIDANCE, image_guidance=IMAGE_GUIDANCE, sampler="ddim", seed=4
    )._replace(image=files.image, mask=mask)
    given = conditioning.asked(cfg, request, ((SIDE, SIDE),), 2)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(4)))(jnp.arange(2))
    noise = diffusion.normal(keys, (SIDE // 2, SIDE // 2, 4))
    ids = np.stack([task.opened.captions(prompt) for prompt in PROMPTS])

    @jax.jit
    def draw(params, given):
        model = bind(task.opened.template, params)
        text = model.encode_text(ids, dtype=task.opened.dtype)
        null = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), task.objective.null(model))
        seen = pure.condition(model, cfg, given, None, task.opened.dtype)
        guidance = Guidance(GUIDANCE, image=IMAGE_GUIDANCE)
        sampler = ddim(cfg.schedule, STEPS)
        return stable_diffusion.generate(
            model, cfg, text, null, noise, sampler, guidance, task.opened.dtype, seen
        )

    with jax.set_mesh(run.mesh):
        ours = np.asarray(draw(params, given)) / 2 + 0.5
        made = [look.pictures["made"] for look in task.preview.complete(params, PROMPTS, request)]
    theirs = draw_torch(cls.from_pretrained(tmp_path / "folder"), kind, files, noise)
    assert np.abs(ours - theirs).max() < 1e-3
    assert theirs.std() > 0.05 and (theirs[0] != theirs[1]).any()
    assert np.abs(np.stack(made) / 255 - theirs).max() < 1e-3 + 0.5 / 255


def draw_torch(pipe, kind, files, noise):
    """(2, Y, X, 3) in [0, 1]."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    image, more = Image.open(files.image), {"image_guidance_scale": IMAGE_GUIDANCE}
    if kind == HOLE:
        more = {"mask_image": Image.open(files.mask), "height": SIDE, "width": SIDE}
        more["strength"] = 1.0
    made = pipe(
        PROMPTS,
        image=[image, image] if kind == SOURCE else image,
        latents=to_torch(noise),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
        **more,
    )
    return made.images


# ---- the commands -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_back_its_pipeline(pipelines, pictures, files, tmp_path, kind, capsys):
    pipe, folder = pipelines[kind]
    changes = {
        "total": "2_steps",
        "cache": str(tmp_path / "cache"),
        "eval_generated": 2,
        "eval_examples": 2,
        "every.sample": "2_steps",
        "sample.prompts": "('a fish',)",
        "optim.lr": 0.01,
        "trainable": r"unet\.conv_(in|out)\..*",
        "export.kind": "folder",
    }
    work = tmp_path / "run"
    assert train.main([*flags_of(folder, pictures, changes), "--workdir", str(work)]) == 0
    shown = capsys.readouterr().out
    assert "moments are not cached" in shown and "cached embeddings of" in shown
    assert stable_diffusion.KINDS[kind] in shown
    again = DiffusionPipeline.from_pretrained(work / "export")
    assert type(again) is type(pipe) and again.unet.config.in_channels == KINDS[kind][0]
    moved = (again.unet.conv_in.weight - pipe.unet.conv_in.weight).abs().amax(dim=(0, 2, 3))
    assert (moved > 0).all(), "each of the channels learned"
    grids = {path.name for path in (work / "samples").glob("*.png")}
    assert {"held-out-000002.png", "prompts-000002.png"} <= grids
    sheet = Image.open(work / "samples" / "held-out-000002.png")
    assert sheet.width == 4 * (96 + 4) + 4, "given, target, before, now"
    check_sample(work, kind, files, tmp_path / "drawn", capsys)


def check_sample(work, kind, files, out, capsys):
    base = ["--workdir", str(work), "--prompt=a cat", "--copies=2", f"--out={out}"]
    full = [f"--image={files.image}", *[f"--mask={files.mask}"] * (kind == HOLE)]
    assert sample.main([*base, *full]) == 0
    assert len(list(out.glob("sample-*.png"))) == 2
    capsys.readouterr()
    assert sample.main(base) == 2
    assert "--image=PATH is missing" in capsys.readouterr().err


# ---- pieces -------------------------------------------------------------------------------


def test_random_masks():
    keys = jax.random.split(jax.random.key(0), 2000)
    masks = np.asarray(pure.random_masks(keys, (24, 32)))
    assert masks.shape == (2000, 24, 32, 1) and set(np.unique(masks)) == {0.0, 1.0}
    covered = masks.mean(axis=(1, 2, 3))
    assert (covered == 1).mean() == pytest.approx(0.25, abs=0.03)
    partly = covered[covered < 1]
    assert partly.min() > 0 and 0.2 < partly.mean() < 0.6
    where = masks[covered < 1].mean(axis=0)
    assert where.min() > 0.05, "corners too"
    alone = pure.random_masks(keys[7:8], (24, 32))
    assert np.array_equal(alone[0], masks[7]), "by its own key"


def test_evaluations_fill_the_centre():
    mask = pure.centre_mask((8, 16))[..., 0]
    assert mask[2:6, 4:12].all() and mask.sum() == 32


def test_what_is_dropped():
    drawn, share = jnp.linspace(0, 1, 101)[:-1] + 0.005, 0.05
    cfg, concat = SimpleNamespace(conditioning=SOURCE), jnp.ones((100, 1, 1, 4))
    captions = np.asarray(pure.captions_dropped(cfg, drawn, share))
    sources = np.asarray(pure.drop_sources(cfg, concat, drawn, share) == 0).all((1, 2, 3))
    counts = [(captions & ~sources).sum(), (captions & sources).sum(), (~captions & sources).sum()]
    assert counts == [5, 5, 5]
    cfg = SimpleNamespace(conditioning=HOLE)
    assert pure.captions_dropped(cfg, drawn, share).sum() == 5
    assert pure.drop_sources(cfg, concat, drawn, share) is concat


# ---- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (SOURCE, {"caption_dropout": 0.4}, "caption_dropout=0.4 must be at most 1/3"),
        (SOURCE, {"data.train": "demo:emoji/train"}, "names no source pictures"),
        (SOURCE, {"data.train": "bare"}, r'metadata.jsonl.*"source" is missing'),
        (SOURCE, {"data.train": "gone"}, "before/05.png does not exist"),
        (SOURCE, {"data.train": "wide"}, "image has 20x24 pixels and its source 40x20"),
        ("depth", {}, r"in_channels=5.*text-to-image UNet takes 4.*inpainting 9"),
    ],
)
def test_mistakes_in_data_and_model(pipelines, pictures, tmp_path, kind, changes, words):
    if changes.get("data.train") in ("bare", "gone", "wide"):
        name = changes["data.train"]
        folder = tmp_path / name
        spec = make_pictures(folder, 8) if name == "bare" else make_edits(folder, 8, ((20, 40),))
        if name == "gone":
            (folder / "before" / "05.png").unlink()
        changes = {"data.train": spec}
    if kind == "depth":
        make_pipeline(tmp_path, "sd", in_channels=5).save_pretrained(tmp_path / "model")
    model = tmp_path / "model" if kind == "depth" else pipelines[kind][1]
    with pytest.raises(UserError, match=words) as caught:
        runs.open_run(make_config(model, pictures, {"data.eval": "", **changes}))
    assert "\n" not in str(caught.value)


def test_sources_are_cropped_and_mirrored_with_their_targets(opened, pictures):
    run, _ = opened(SOURCE, {"flip": True, "buckets": True, "data.eval": ""})
    rows, folder = run.train, pictures.removeprefix("folder:")
    assert len(rows) == 16
    for index in (3, 11):
        images = rows.shares[0].images[index]
        other = Image.open(f"{folder}/before/03.png").convert("RGB")
        wanted = fit(other, images.pixels.shape[:2], index > 7).pixels
        assert np.array_equal(rows[index]["source"], wanted)
