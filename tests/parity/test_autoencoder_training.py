"""Alternating updates against a torch loop over diffusers' and transformers' autoencoders."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file
from test_discriminator import oracle as patchgan
from test_discriminator import to_torch as judge_to_torch
from test_perceptual import lite0
from tiny_autoencoders import make_config, make_images, make_janus, make_vae, make_vqmodel
from transformers import JanusVQVAE

from jaxft import run as runs
from jaxft.core.checkpoint import Checkpoints
from jaxft.core.sharding import place_batch
from jaxft.core.step import sample_keys
from jaxft.models import discriminator
from jaxft.models.perceptual import DEMO_FOLDER
from jaxft.weights import transfer

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STEPS, LR, DECAY, BETA, KL = 5, 2e-4, 0.1, 0.25, 1e-3
WIDTHS, GROUPS = (8, 16, 32, 64), 4  # of a discriminator that does not take minutes
COMMON = {
    "optim.lr": LR,
    "optim.weight_decay": DECAY,
    "optim.warmup": "2_steps",
    "optim.schedule": "constant",
    "loss.kl": KL,
}
INVARIANT = ("to_k.bias", ".k.bias")  # softmax does not see it: its gradient is rounding alone


def jax_steps(config, tmp_path, steps=STEPS):
    """(batches, reports of each step, torch-keyed weights before and after)."""
    run = runs.open_run(config)
    plan = runs.make_plan(run)
    batches, reports = [], []
    with jax.set_mesh(run.mesh):
        state, frozen = runs.start_state(run, plan, Checkpoints(tmp_path / "run"), 0)
        before = weights(run, {**frozen, **state.params})
        stream = run.task.train_batches(0, slice(0, run.cfg.batch_size))
        step_fn = None
        for _ in range(steps):
            batches.append(next(stream))
            placed = place_batch(batches[-1], run.mesh)
            if step_fn is None:
                lowered = runs.make_step(run, plan).lower(state, frozen, placed)
                step_fn = lowered.compile(compiler_options=QUICK)
            state, report = step_fn(state, frozen, placed)
            reports.append({name: float(value) for name, value in report.items()})
        after = weights(run, {**frozen, **state.params})
    return batches, reports, before, after


def weights(run, params):
    part = run.task.parts[0]
    own = {k: v.copy() for k, v in transfer.export(part, run.leaves, params, {}, None).tensors}
    if run.task.losses.adversarial:
        state = judge_to_torch({k: np.asarray(v) for k, v in params.items()}, "discriminator.")
        own |= {f"discriminator.{key}": value.numpy().copy() for key, value in state.items()}
    return own


class TorchKL:
    """diffusers' AutoencoderKL with the noise that jaxft draws."""

    def __init__(self, folder):
        self.model = AutoencoderKL.from_pretrained(folder)

    def __call__(self, x, noise):
        posterior = self.model.encode(x).latent_dist
        y = self.model.decode(posterior.mean + posterior.std * noise).sample
        return y, {"kl": KL * posterior.kl().mean()}


class TorchVQ:
    """LlamaGen's quantizer between the parts of diffusers' VQModel or transformers' JanusVQVAE."""

    def __init__(self, cls, folder):
        self.model, self.l2 = cls.from_pretrained(folder), cls is JanusVQVAE

    def __call__(self, x, noise):
        m = self.model
        z = m.quant_conv(m.encoder(x)).permute(0, 2, 3, 1)
        table = m.quantize.embedding.weight
        if self.l2:
            z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
        codes = torch.cdist(z.flatten(0, 2), table).argmin(1).view(z.shape[:3])
        found = table[codes]
        latent = {
            "codebook": (found - z.detach()).square().mean(),
            "commitment": BETA * (found.detach() - z).square().mean(),
        }
        through = (z + (found - z).detach()).permute(0, 3, 1, 2)
        return m.decoder(m.post_quant_conv(through)), latent


def reconstruction(losses, x, y):
    terms = {"l1": losses["l1"] * (x - y).abs().mean(), "l2": losses["l2"] * F.mse_loss(x, y)}
    if losses["perceptual"]:
        stored = load_file(DEMO_FOLDER / "model.safetensors")
        w = {key: tensor.float() for key, tensor in stored.items()}
        terms["perceptual"] = losses["perceptual"] * lite0(w, x, y).mean()
    return {name: term for name, term in terms.items() if losses[name]}


def norm_at(loss, last):
    return torch.autograd.grad(loss, last, retain_graph=True)[0].norm()


def play(codec, judge, losses, active, x, noise):
    """Both players' losses of one micro-batch, as LlamaGen computes them, and all terms."""
    y, latent = codec(x, noise)
    terms = reconstruction(losses, x, y)
    generator = sum(terms.values()) + sum(latent.values())
    terms |= latent
    if judge is None:
        return generator, None, terms
    judge.requires_grad_(False)
    adversarial, last = -judge(y).mean(), codec.model.decoder.conv_out.weight
    rec = sum(term for name, term in terms.items() if name not in latent)
    weight = norm_at(rec, last) / (norm_at(adversarial, last) + 1e-4)
    factor = active * losses["adversarial"] * weight.clamp(0, 1e4).detach()
    judge.requires_grad_(True)
    real, fake = judge(x), judge(y.detach())
    judged = active * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    terms |= {"adversarial": adversarial, "factor": factor, "discriminator": judged}
    return generator + factor * adversarial, judged, terms


def optimizer(module):
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)


def torch_steps(config, codec, judge_state, batches):
    """(terms of each step, weights after): one forward pass a micro-batch, then both updates."""
    players, judge = [codec.model], None
    if judge_state:
        judge = patchgan(WIDTHS, GROUPS)
        judge.load_state_dict(judge_state)
        players.append(judge)
    optimizers = [optimizer(player) for player in players]
    seen = []
    for k, batch in enumerate(batches):
        seen.append(gradients(config, codec, judge, k, batch))
        for player, one in zip(players, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0)
            for group in one.param_groups:
                group["lr"] = LR * min(1.0, (k + 1) / 2)
            one.step()
            one.zero_grad()
    after = codec.model.state_dict()
    if judge is not None:
        after = after | {f"discriminator.{n}": t for n, t in judge.state_dict().items()}
    return seen, {name: tensor.detach().numpy() for name, tensor in after.items()}


def gradients(config, codec, judge, step, batch):
    """Accumulate both players' gradients over the micro-batches; the means of all terms."""
    losses, micro = config["loss"], config["micro_batches"]
    active = float(step >= int(losses["adversarial_start"].removesuffix("_steps")))
    x = torch.tensor(batch["pixels"]).permute(0, 3, 1, 2) / 127.5 - 1
    z = noise(config["seed"], step, batch["sample_ids"], x.shape[-1] // 2)
    sums = {}
    for i in range(micro):
        generator, judged, terms = play(codec, judge, losses, active, x[i::micro], z[i::micro])
        for loss in (generator, judged):
            if loss is not None:
                (loss / micro).backward()
        for name, term in {**terms, "loss": generator}.items():
            sums[name] = sums.get(name, 0.0) + float(term.detach()) / micro
    return sums


def noise(seed, step, sample_ids, side):
    """What `vae.sample` draws for the rows of a step, NCHW."""
    keys = sample_keys(seed, step, sample_ids)
    drawn = jax.vmap(lambda key: jax.random.normal(key, (side, side, 4)))(keys)
    return torch.tensor(np.asarray(drawn)).permute(0, 3, 1, 2)


def assert_same_updates(before, after, wanted, tolerance=1e-3):
    """Every tensor's update equals the oracle's within `tolerance` of that update's norm."""
    assert before.keys() == wanted.keys()
    for key, start in before.items():
        if key.endswith(INVARIANT):
            continue
        ours, theirs = after[key] - start, wanted[key] - start
        error, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        assert error <= tolerance * size, f"{key}: update differs by {error:.1e} of {size:.1e}"


def assert_same_terms(reports, seen):
    """At the start all terms within 1e-5; after it the weights themselves differ by roundings."""
    for step, (ours, theirs) in enumerate(zip(reports, seen, strict=True)):
        for name, value in theirs.items():
            limit = 1e-3 if step else 1e-5
            assert ours[name] == pytest.approx(value, rel=limit, abs=limit / 10), (step, name)


def judge_of(tensors):
    """The discriminator's tensors among all."""
    own = {k: v for k, v in tensors.items() if k.startswith("discriminator.")}
    return {k.removeprefix("discriminator."): torch.tensor(v) for k, v in own.items()}


def compare(config, codec, tmp_path):
    batches, reports, before, after = jax_steps(config, tmp_path)
    seen, wanted = torch_steps(config, codec, judge_of(before), batches)
    assert_same_terms(reports, seen)
    assert_same_updates(before, after, wanted)
    return reports


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("autoencoders")


@pytest.fixture(scope="module")
def images(work):
    return make_images(work / "images")


@pytest.fixture(autouse=True)
def small_judge(monkeypatch):
    monkeypatch.setattr(discriminator, "WIDTHS", WIDTHS)
    monkeypatch.setattr(discriminator, "GROUPS", GROUPS)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


CASES = {
    "start": {**COMMON, "loss.adversarial": 0.5, "loss.l2": 0.3},
    "middle": {
        **COMMON,
        "loss.adversarial": 0.5,
        "loss.adversarial_start": "2_steps",
        "micro_batches": 2,
    },
    "perceptual": {**COMMON, "loss.adversarial": 0.5, "loss.perceptual": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_five_alternating_updates_equal_torch(work, images, one_device, tmp_path, case):
    """All terms too: the adaptive weight is that of each micro-batch."""
    config = make_config(make_vae(work / "vae"), images, CASES[case])
    reports = compare(config, TorchKL(config["model"]), tmp_path)
    off = [report["factor"] == report["discriminator"] == 0 for report in reports]
    assert off == [case == "middle" and step < 2 for step in range(STEPS)]


def test_eight_devices_equal_torch_too(work, images, tmp_path):
    """Parameters over fsdp=4 and rows over all eight."""
    meshes = {"mesh.data": 2, "mesh.fsdp": 4, "loss.adversarial": 0.5}
    config = make_config(make_vae(work / "vae"), images, {**COMMON, **meshes})
    compare(config, TorchKL(config["model"]), tmp_path)


@pytest.mark.parametrize("cls", [VQModel, JanusVQVAE])
def test_vq_updates_equal_torch(work, images, one_device, tmp_path, cls):
    """LlamaGen's losses of the codes, and its unit lengths in a Janus folder."""
    make = make_vqmodel if cls is VQModel else make_janus
    changes = {**COMMON, "resolution": 16, "loss.commitment": BETA}
    config = make_config(make(work / cls.__name__), images, changes)
    compare(config, TorchVQ(cls, config["model"]), tmp_path)
