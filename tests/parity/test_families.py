"""Families of decoders against transformers, fp32 on CPU: what a short prompt does not show too.

Numbers such as R1 name the traps of the families. Rows go beyond each window and each rope's
original length.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from jaxft.core import optim, sharding
from jaxft.core import params as P
from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.kernels.cross_entropy import linear_cross_entropy, linear_log_probs
from jaxft.models import registry
from jaxft.models.decoders.classifier import class_name, open_classifier
from jaxft.models.decoders.generation.generate import generate
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.objectives.distillation import Outputs, linear_divergence
from jaxft.weights import rules, transfer
from jaxft.weights.adapters import peft as adapters
from jaxft.weights.adapters import peft_folder
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from tests.families import CASES, MIXTURES, ONE_EACH, WRAPPED, YARN, Pair, jit, logits, tokens


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, one_thread):
    """`pairs(case)`: each case's models, made once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = Pair(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, pairs):
    """Rows of 64 at position 0, far out, and left-padded; gradients by tensor."""
    pair, ids = pairs(case), tokens(3, 64)
    mask = np.ones_like(ids)
    mask[2, :5] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) + np.array([[0], [4096], [0]])
    pair.theirs.zero_grad()
    out = pair.theirs(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions).long(),
        use_cache=False,
    ).logits
    slope = mask[..., None] * np.random.default_rng(9).normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(slope)).sum().backward()
    want = out.detach().numpy()
    assert np.abs(want).max() > 1

    def loss(model):
        hidden, _ = model.hidden(ids, jnp.asarray(positions, jnp.int32), mask, unroll=1)
        return (model.logits(hidden) * slope).sum(), model.logits(hidden)

    grads, got = jit(jax.grad(loss, has_aux=True))(pair.ours)
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got)[mask > 0], want[mask > 0], atol=2e-5 * scale)
    state = pair.in_file({key: one.grad for key, one in pair.theirs.named_parameters()})
    flat = P.flatten(grads)
    for entry in pair.part.class_entries(pair.leaves):
        for i, key in enumerate(entry.keys):
            part = np.asarray(flat[entry.path])[entry.place(i)]
            mine = rules.to_torch(part, entry.layout, pair.part.sizes)
            theirs = state[key].numpy()
            apart = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
            assert apart < 1e-3, f"{key}: {apart}"


@pytest.mark.parametrize("case", CASES)
def test_every_loss_has_the_scaled_logits(case, pairs):
    """R1, G4: the chunked losses and generation take the same logits as a call of the model.

    The teacher of the divergence is the same model on other tokens.
    """
    pair, ids, others = pairs(case), tokens(2, 12), tokens(2, 12, seed=1)
    targets, ones = np.roll(ids, -1, 1), np.ones(ids.shape, np.float32)
    both = [torch.log_softmax(torch.tensor(logits(pair.theirs, x)), -1) for x in (ids, others)]
    want = np.take_along_axis(both[0].numpy(), targets[..., None], -1)[..., 0]
    apart = (both[1].exp() * (both[1] - both[0])).sum().item()

    @jit
    def run(model):
        (head, first, cap), features = model.head(), model.features(model.hidden(ids, unroll=1)[0])
        how = {"vocab_first": first, "soft_cap": cap, "chunk": 5}
        each = linear_log_probs(features, head, targets, **how)
        total, _ = linear_cross_entropy(features, head, targets, ones, **how)
        taught = model.features(model.hidden(others, unroll=1)[0])
        table = head if first else head.T
        pair = Outputs(features, table, cap), Outputs(taught, table, cap)
        return each, total, linear_divergence(*pair, ones)

    each, total, divergence = run(pair.ours)
    np.testing.assert_allclose(each, want, atol=5e-5)
    np.testing.assert_allclose(total, -want.sum(), rtol=1e-5)
    np.testing.assert_allclose(divergence, apart, rtol=1e-4)


@pytest.mark.parametrize("case", ONE_EACH)
def test_packed_rows_are_separate_rows(case, pairs):
    ours, ids = pairs(case).ours, tokens(1, 40)
    sizes = (17, 19, 2, 2)
    segments = np.repeat([[1, 2, 3, 0]], sizes, axis=1)
    positions = np.concatenate([np.arange(n) for n in sizes])[None].astype(np.int32)
    call = jit(lambda m, *a: m.logits(m.hidden(*a, unroll=1)[0]))
    packed = call(ours, ids, positions, segments)
    for start, end in ((0, 17), (17, 36), (36, 38)):
        alone = call(ours, ids[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=5e-5)


@pytest.mark.parametrize("case", ONE_EACH)
def test_greedy_decoding_of_32_tokens(case, pairs):
    pair, ids = pairs(case), tokens(2, 40, seed=1)
    want = pair.theirs.generate(
        torch.tensor(ids).long(), max_new_tokens=32, do_sample=False, pad_token_id=0
    )[:, 40:]
    made, _ = generate(
        pair.ours, ids, np.ones_like(ids), jax.random.split(jax.random.key(0), 2), max_new=32,
        stop_ids=(), how=Sampling(), dtype=jnp.float32,
    )  # fmt: skip
    assert np.asarray(made).tolist() == want.tolist() and len(np.unique(want)) > 6


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_every_tensor_bit_for_bit(case, pairs):
    """W2: also those of the pictures, which no parameter has, under the names of the file."""
    pair, seen = pairs(case), []
    theirs = pair.in_file(pair.theirs.state_dict())
    for key, made in transfer.export(pair.part, pair.leaves, pair.params, {}, None).tensors:
        np.testing.assert_array_equal(made, theirs[pair.part.named(key)].numpy())
        seen.append(key)
    assert seen == pair.part.tensors.keys()
    stale = {key for key in theirs if pair.cfg.tied and key == "lm_head.weight"}
    assert set(map(pair.part.named, seen)) == theirs.keys() - stale


@pytest.mark.parametrize("case", ONE_EACH)
def test_shards_in_and_shards_out_have_the_same_tensors(case, pairs, tmp_path):
    pair = pairs(case)
    assert len(list(Path(pair.folder).glob("model-*.safetensors"))) > 1
    made = transfer.export(pair.part, pair.leaves, pair.params, {}, None)
    write_sharded(tmp_path, made.tensors, made.infos, 15000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    there, source = TensorFiles.open(tmp_path), pair.part.tensors
    assert sorted(there.keys()) == sorted(source.keys())
    for key in there.keys():  # noqa: SIM118
        assert there.info(key) == source.info(key)
        assert there.read(key).tobytes() == source.read(key).tobytes()


@pytest.mark.parametrize("case", ONE_EACH)
def test_adapters_both_ways(case, pairs, tmp_path):
    pair, ids = pairs(case), tokens(2, 12)
    base = logits(pair.theirs, ids)

    def adapted(template, arrays):
        call = jit(lambda params: P.bind(template, params).hidden(ids, unroll=1)[0])
        model = P.bind(template, {**pair.params, **arrays})
        return np.asarray(model.logits(call({**pair.params, **arrays})))

    def load():
        return pair.auto.from_pretrained(
            pair.folder, attn_implementation="eager", dtype=torch.float32
        ).eval()

    cfg = Lora(rank=3, alpha=6.0, targets=pair.architecture.lora)
    template, leaves = pair.adapted(cfg)
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        for path, leaf in leaves.items()
        if ".lora_" in path
    }
    adapters.write(tmp_path, pair.part, leaves, arrays, cfg, pair.folder)
    theirs = logits(PeftModel.from_pretrained(load(), str(tmp_path)), ids)
    assert np.abs(theirs - base).max() > 0.1 * np.abs(theirs).max()
    np.testing.assert_allclose(adapted(template, arrays), theirs, atol=1e-4)

    torch.manual_seed(0)
    targets = ["v_proj", "down_proj"]
    if case in WRAPPED:  # the modules of pictures have such names, too
        targets = r".*language_model.*\.(v_proj|down_proj)"
    elif case in MIXTURES:  # PEFT would adapt experts by another kind of adapter
        targets = ["q_proj", "v_proj"]
    elif case == "phi3":
        targets = ["qkv_proj", "gate_up_proj"]
    theirs = get_peft_model(
        load(), LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = peft_folder.fit(
        peft_folder.read(tmp_path / "theirs"), pair.part.class_entries(pair.leaves)
    )
    template, leaves = pair.adapted(adapter.lora)
    got = adapted(template, adapters.load(adapter, pair.part, leaves))
    np.testing.assert_allclose(got, logits(theirs, ids), atol=1e-4)


@pytest.mark.parametrize("case", ONE_EACH)
def test_c6_bf16_is_as_near_to_fp32_as_transformers_bf16(case, tmp_path, one_thread):
    pair = Pair(case, tmp_path, torch.bfloat16)
    ids = tokens(12 if case in MIXTURES else 4, 64)
    low = logits(pair.theirs, ids)
    want = logits(pair.theirs.float(), ids)
    run = jit(lambda m: m.logits(m.hidden(ids, unroll=1, dtype=jnp.bfloat16)[0]))
    got = np.asarray(run(pair.ours))
    rms = [np.sqrt(np.mean((one - want) ** 2)) for one in (got, low)]
    if case in MIXTURES:  # a few tokens near a border get another expert, in each in its own way
        rms = [np.median(np.sqrt(np.mean((one - want) ** 2, -1))) for one in (got, low)]
    assert rms[0] < 1.2 * rms[1], rms
    assert rms[1] < 0.05 * np.sqrt(np.mean(want**2)), "bf16 is no noise here"


def test_g3_the_embedding_scale_is_rounded_as_the_weights_are():
    """25.25, 34, 50.5, 62 and 73.5 in bf16, and not rounded in fp32."""
    rounded = {640: 25.25, 1152: 34.0, 2560: 50.5, 3840: 62.0, 5376: 73.5}
    for size, want in rounded.items():
        cfg = registry.read_decoder({"model_type": "gemma3_text", "hidden_size": size})
        assert cfg.embedding_scale == size**0.5
        assert float(jnp.asarray(cfg.embedding_scale, jnp.bfloat16)) == want


@pytest.mark.parametrize("case", ["gemma3", "granite"])
def test_g1_weight_decay_leaves_norms_alone(case, pairs):
    leaves = pairs(case).leaves
    norms = [path for path in leaves if "norm" in path]
    made = P.flatten(pairs(case).build())
    start = 0.0 if case == "gemma3" else 1.0
    assert len(norms) == (7 if case == "gemma3" else 3)
    assert all((np.asarray(made[path]) == start).all() for path in norms)
    optimiser = optim.make_optimizer(
        "adamw", 1.0, b1=0.9, b2=0.99, weight_decay=0.5, clip=0.0, leaves=leaves
    )
    ones = {path: jnp.ones(x.shape) for path, x in leaves.items()}
    still = {path: jnp.zeros(x.shape) for path, x in leaves.items()}
    steps, _ = optimiser.update(still, optimiser.init(ones), ones)
    assert {path for path, x in steps.items() if not np.asarray(x).any()} >= set(norms)


@pytest.mark.parametrize("case", ["gemma2", "gemma3 untied"])
def test_c5_the_caps_of_these_cases_change_the_logits(case, pairs, monkeypatch):
    pair, ids = pairs(case), tokens(2, 40)
    theirs, want = pair.theirs, logits(pair.theirs, ids)
    if case == "gemma2":
        for layer in theirs.model.layers:
            monkeypatch.setattr(layer.self_attn, "attn_logit_softcapping", None)
        assert np.abs(logits(theirs, ids) - want).max() > 0.05
        monkeypatch.undo()
    monkeypatch.setattr(theirs.config, "final_logit_softcapping", None)
    assert np.abs(logits(theirs, ids) - want).max() > 0.5


def test_what_gemma_does_not_compute_is_refused():
    for kind in ("gemma2", "gemma3_text"):
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            with pytest.raises(UserError, match=f"{key}=0 divides by 0"):
                registry.read_decoder({"model_type": kind, key: 0})
        with pytest.raises(UserError, match="use_bidirectional_attention=true is not supported"):
            registry.read_decoder({"model_type": kind, "use_bidirectional_attention": True})
    for kind in ("gemma3_text", "olmo3"):
        with pytest.raises(UserError, match="for full_attention and one for sliding"):
            registry.read_decoder({"model_type": kind, "rope_parameters": YARN})


@pytest.mark.parametrize("case", ["phi3", "gemma2"])
def test_a_mesh_gives_the_same_loss_and_gradients(case, pairs, capfd):
    """Fused projections are split over heads, and the vocabulary's slices have their soft-cap."""
    pair, ids = pairs(case), tokens(8, 16)
    targets, ones = np.roll(ids, -1, 1), np.ones(ids.shape, np.float32)

    def loss(params, ids):
        model = P.bind(pair.template, params)
        (head, first, cap), (hidden, _) = model.head(), model.hidden(ids, unroll=1)
        how = {"vocab_first": first, "soft_cap": cap}
        return linear_cross_entropy(model.features(hidden), head, targets, ones, **how)[0]

    step = jit(jax.value_and_grad(loss))
    want, wanted = step(pair.params, ids)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(pair.params, sharding.shardings(pair.leaves, mesh))
        got, grads = step(placed, jax.device_put(ids, sharding.batch_sharding(mesh)))
    assert abs(float(got) / float(want) - 1) < 1e-5
    for path, grad in jax.device_get(grads).items():
        worst = np.abs(grad - wanted[path]).max() / np.abs(wanted[path]).max()
        assert worst < 1e-5, f"{path}: {worst}"
    assert "Involuntary" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [40, 20])
def test_p3_the_whole_row_decides_between_short_and_long_factors(length, pairs):
    """A continuation beyond `original` (32) has the long ones from its start, as its keys stay."""
    ours, ids = pairs("phi3").ours, tokens(2, length)
    made, _ = generate(
        ours, ids, np.ones_like(ids), jax.random.split(jax.random.key(0), 2), max_new=16,
        stop_ids=(), how=Sampling(), dtype=jnp.float32,
    )  # fmt: skip
    whole = np.concatenate([ids, made], axis=1)
    best = jit(lambda m: m.logits(m.hidden(whole, unroll=1)[0]))(ours).argmax(-1)
    np.testing.assert_array_equal(best[:, length - 1 : -1], made)


def test_p3_the_first_positions_of_a_row_change_beyond_original(pairs):
    pair, ids = pairs("phi3"), tokens(1, 40)
    short, long = logits(pair.theirs, ids[:, :32]), logits(pair.theirs, ids)[:, :32]
    assert np.abs(short - long).max() > 1e-2
    call = jit(lambda m, ids: m.logits(m.hidden(ids, unroll=1)[0]))
    np.testing.assert_allclose(call(pair.ours, ids[:, :32]), short, atol=5e-5)


def test_p4_other_ropes_and_fractions_are_refused():
    for changes, text in (
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "only default and longrope"),
        ({"partial_rotary_factor": 1.5}, "expected a number above 0 and up to 1"),
        ({"partial_rotary_factor": 0.3, "hidden_size": 320}, r"head_dim=10 times .*=0.3 is odd"),
    ):
        with pytest.raises(UserError, match=text):
            registry.read_decoder({"model_type": "phi3", **changes})


def test_n2_ministral3_needs_the_growth_of_its_queries():
    for rope in (YARN, {**YARN, "llama_4_scaling_beta": "0.1"}):
        with pytest.raises(UserError, match="expected numbers llama_4_scaling_beta"):
            registry.read_decoder({"model_type": "ministral3", "rope_parameters": rope})
    cfg = registry.read_decoder({"model_type": "ministral3"})
    assert cfg.query_scaling == (0.1, 16384) and cfg.ropes[0].scale == 1.0


def test_gemma3s_classifier_is_the_one_for_texts(pairs):
    assert class_name(pairs("gemma2").config) == "Gemma2ForSequenceClassification"
    assert class_name(pairs("gemma3").config) == "Gemma3TextForSequenceClassification"
    source = open_classifier(pairs("gemma3").folder, labels=("a", "b"))
    assert "score.weight" in source.tensors.keys()  # noqa: SIM118


def test_no_sequence_classifier_of_granite(pairs):
    with pytest.raises(UserError, match="no sequence classifier for GraniteForCausalLM"):
        open_classifier(pairs("granite").folder, labels=("a", "b"))
