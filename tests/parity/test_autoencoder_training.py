"""Alternating updates against a torch loop over diffusers' and transformers' autoencoders."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file
from transformers import JanusVQVAE

from jaxft.core.sharding import local_rows, place_batch
from jaxft.core.step import sample_keys
from jaxft.demo import demo_path
from jaxft.models.critics import discriminator
from jaxft.models.critics.perceptual import DEMO
from jaxft.runs.checkpoint import Checkpoints
from jaxft.weights import transfer
from tests import whole as runs
from tests.parity.test_discriminator import oracle as patchgan
from tests.parity.test_discriminator import to_torch as judge_to_torch
from tests.parity.test_perceptual import lite0
from tests.tiny_autoencoders import make_config, make_images, make_janus, make_vae, make_vqmodel

# Without any optimisation a step takes longer than the compiler saves.
QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
STEPS, LR, DECAY, BETA, KL, REVIVE = 5, 2e-4, 0.1, 0.25, 1e-3, 0.5
WIDTHS, GROUPS = (8, 16, 32, 64), 4  # of a discriminator that does not take minutes
# Its narrow layers then judge by about 2: some patches are beyond the hinge and others are not.
# With all of them before it the last bias would have no gradient, only roundings.
STD = 0.1
COMMON = {
    "optim.lr": LR,
    "optim.weight_decay": DECAY,
    "optim.warmup": "2_steps",
    "optim.schedule": "constant",
    "loss.kl": KL,
    "loss.adversarial": 0.5,
    "data.eval": "",
}
LATER = {
    **COMMON,
    "loss.l2": 0.3,
    "loss.adversarial_start": "2_steps",
    "batch_size": 16,
    "micro_batches": 2,
}
LATE = {"vae": LATER, "vqmodel": {**LATER, "loss.commitment": BETA, "loss.revive": REVIVE}}
MAKE = {"vae": make_vae, "vqmodel": make_vqmodel}
INVARIANT = ("to_k.bias", ".k.bias")  # softmax does not see it: its gradient is rounding alone
MESHES = {"data8": (8, 1), "fsdp8": (1, 8)}
ON_EIGHT = [
    ("vqmodel", "fsdp8"),
    pytest.param("vae", "data8", marks=pytest.mark.slow),
    pytest.param("vae", "fsdp8", marks=pytest.mark.slow),
    pytest.param("vqmodel", "data8", marks=pytest.mark.slow),
]


def jax_steps(config, work):
    """(batches, reports of each step, torch-keyed weights before and after)."""
    run = runs.open_run(config)
    plan = runs.make_plan(run)
    with jax.set_mesh(run.mesh):
        state, frozen, _ = runs.start_state(run, plan, Checkpoints(work / "run"), 0)
        before = weights(run, {**frozen, **state.params})
        stream = run.train.batches(0, local_rows(run.mesh, run.cfg.batch_size))
        batches, reports = [next(stream) for _ in range(STEPS)], []
        placed = [place_batch(batch, run.mesh) for batch in batches]
        lowered = runs.make_step(run, plan).lower(state, frozen, placed[0])
        step_fn = lowered.compile(compiler_options=QUICK)
        for batch in placed:
            state, report = step_fn(state, frozen, batch)
            reports.append({name: float(value) for name, value in report.items()})
        after = weights(run, {**frozen, **state.params})
    return batches, reports, before, after


def weights(run, params):
    """Both players' tensors under torch's names."""
    part = run.opened.parts[0]
    own = {k: v.copy() for k, v in transfer.export(part, run.leaves, params, {}, None).tensors}
    if run.opened.losses.adversarial:
        state = judge_to_torch({k: np.asarray(v) for k, v in params.items()}, "discriminator.")
        own |= {f"discriminator.{key}": value.numpy().copy() for key, value in state.items()}
    return own


class TorchKL:
    """diffusers' AutoencoderKL with the noise that jaxft draws."""

    def __init__(self, folder):
        self.model = AutoencoderKL.from_pretrained(folder).double()

    def __call__(self, x, noise):
        posterior = self.model.encode(x).latent_dist
        y = self.model.decode(posterior.mean + posterior.std * noise).sample
        return y, {"kl": KL * posterior.kl().mean()}


class TorchVQ:
    """LlamaGen's quantizer between the parts of diffusers' VQModel or transformers' JanusVQVAE."""

    def __init__(self, cls, folder, revive=0.0):
        self.model, self.l2 = cls.from_pretrained(folder).double(), cls is JanusVQVAE
        self.revive = revive

    def __call__(self, x, noise):
        m = self.model
        z = m.quant_conv(m.encoder(x)).permute(0, 2, 3, 1)
        table = m.quantize.embedding.weight
        if self.l2:
            z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
        distances = torch.cdist(z.flatten(0, 2), table).detach()
        codes = distances.argmin(1).view(z.shape[:3])
        found, unused = table[codes], torch.bincount(codes.flatten(), minlength=len(table)) == 0
        assert unused.any() or not self.revive
        stray = table - z.detach().flatten(0, 2)[distances.argmin(0)]
        latent = {
            "codebook": (found - z.detach()).square().mean(),
            "commitment": BETA * (found.detach() - z).square().mean(),
        }
        if self.revive:
            latent["revive"] = self.revive * (unused[:, None] * stray.square()).mean()
        through = (z + (found - z).detach()).permute(0, 3, 1, 2)
        return m.decoder(m.post_quant_conv(through)), latent


CODECS = {"vae": TorchKL, "vqmodel": partial(TorchVQ, VQModel, revive=REVIVE)}


def reconstruction(losses, x, y):
    terms = {"l1": losses["l1"] * (x - y).abs().mean(), "l2": losses["l2"] * F.mse_loss(x, y)}
    if losses["perceptual"]:
        stored = load_file(demo_path(DEMO, "perceptual") / "model.safetensors")
        w = {key: tensor.double() for key, tensor in stored.items()}
        terms["perceptual"] = losses["perceptual"] * lite0(w, x, y).mean()
    return {name: term for name, term in terms.items() if losses[name]}


def norm_at(loss, last):
    return torch.autograd.grad(loss, last, retain_graph=True)[0].norm()


def play(codec, judge, losses, active, x, noise):
    """Both players' losses of one micro-batch, as LlamaGen computes them, and all terms."""
    y, latent = codec(x, noise)
    terms = reconstruction(losses, x, y)
    generator = sum(terms.values()) + sum(latent.values())
    if judge is None:
        return generator, None, terms | latent
    judge.requires_grad_(False)
    adversarial, last = -judge(y).mean(), codec.model.decoder.conv_out.weight
    weight = norm_at(sum(terms.values()), last) / (norm_at(adversarial, last) + 1e-4)
    factor = active * losses["adversarial"] * weight.clamp(0, 1e4).detach()
    judge.requires_grad_(True)
    real, fake = judge(x), judge(y.detach())
    judged = active * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    terms |= {**latent, "adversarial": adversarial, "factor": factor, "discriminator": judged}
    return generator + factor * adversarial, judged, terms


def optimizer(module):
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)


def torch_steps(config, codec, judge_state, batches):
    """(terms of each step, weights after): one forward pass a micro-batch, then both updates.

    In fp64: Adam divides by the size of a gradient, so that two fp32 loops differ in those of
    nearly nothing.
    """
    players, judge = [codec.model], None
    if judge_state:
        judge = patchgan(WIDTHS, GROUPS).double()
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
    x = torch.tensor(batch["pixels"]).double().permute(0, 3, 1, 2) / 127.5 - 1
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
    return torch.tensor(np.asarray(drawn, np.float64)).permute(0, 3, 1, 2)


def assert_same_updates(before, after, wanted, tolerance=1e-3):
    """Every tensor's update equals the oracle's within `tolerance` of that update's norm."""
    assert before.keys() == wanted.keys()
    worst = {}
    for key, start in before.items():
        if key.endswith(INVARIANT):
            continue
        ours, theirs = after[key] - start, wanted[key] - start
        assert np.any(theirs), f"{key} does not train"
        worst[key] = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    key = max(worst, key=lambda name: worst[name])
    print(f"{len(worst)} tensors, worst update {worst[key]:.1e} of {key}")
    assert worst[key] < tolerance, f"{key}: update differs by {worst[key]:.1e}"


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


def compare(config, codec, work):
    batches, reports, before, after = jax_steps(config, work)
    seen, wanted = torch_steps(config, codec, judge_of(before), batches)
    assert_same_terms(reports, seen)
    assert_same_updates(before, after, wanted)
    return reports


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("autoencoders")


@pytest.fixture(scope="module")
def images(work):
    return make_images(work / "images", count=16)


@pytest.fixture(scope="module", autouse=True)
def small_judge():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WIDTHS": WIDTHS, "GROUPS": GROUPS, "STD": STD}.items():
            patch.setattr(discriminator, name, value)
        yield


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


@pytest.mark.slow
def test_five_alternating_updates_equal_torch(work, images, one_device, tmp_path):
    """Perceptual and adversarial losses, and the adaptive weight of both."""
    config = make_config(make_vae(work / "vae"), images, {**COMMON, "loss.perceptual": 0.5})
    reports = compare(config, TorchKL(config["model"]), tmp_path)
    assert all(report["factor"] > 0 and report["perceptual"] > 0 for report in reports)


def test_a_janus_tokenizer_equals_torch(work, images, one_device, tmp_path):
    """Unit lengths in the search, the decoder and the losses; unopposed."""
    changes = {"resolution": 16, "loss.adversarial": 0.0}
    config = make_config(make_janus(work / "janus"), images, {**COMMON, **changes})
    compare(config, TorchVQ(JanusVQVAE, config["model"]), tmp_path)


@pytest.fixture(scope="module")
def alone(work, images):
    """`alone(name)`: (config, what jax_steps gives) of one of LATE on one device."""
    made = {}

    def get(name):
        if name not in made:
            config = make_config(MAKE[name](work / f"late-{name}"), images, LATE[name])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "device_count", lambda *_: 1)
                made[name] = config, jax_steps(config, work / f"run-{name}")
        return made[name]

    return get


@pytest.mark.parametrize("name", LATE)
def test_a_late_adversary_in_micro_batches_equals_torch(alone, name):
    """Each micro-batch has an adaptive weight of its own."""
    config, (batches, reports, before, after) = alone(name)
    codec = CODECS[name](config["model"])
    seen, wanted = torch_steps(config, codec, judge_of(before), batches)
    assert_same_terms(reports, seen)
    off = [report["factor"] == report["discriminator"] == 0 for report in reports]
    assert off == [True, True, False, False, False]
    assert_same_updates(before, after, wanted)


@pytest.mark.parametrize(("name", "mesh"), ON_EIGHT)
def test_eight_devices_equal_one(alone, images, tmp_path, capfd, name, mesh):
    """Rows and parameters over eight, both players of them."""
    config, (_, wanted, start, end) = alone(name)
    sizes = dict(zip(("mesh.data", "mesh.fsdp"), MESHES[mesh], strict=True))
    spread = make_config(config["model"], images, {**LATE[name], **sizes})
    _, reports, before, after = jax_steps(spread, tmp_path)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert all(np.array_equal(before[key], start[key]) for key in start)
    assert_same_terms(reports, wanted)
    assert_same_updates(before, after, end)
