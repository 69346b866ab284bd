"""Image-token folders against transformers: the tokenizer, the loss of codes, greedy codes."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxft.core import runtime
from jaxft.core.params import Leaf, Params, bind, describe
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.models.pipelines.image_decode import generate_codes
from jaxft.objectives.codes import train_rows
from jaxft.tasks.image_tokens.janus import JanusFolder
from jaxft.tasks.image_tokens.layout import (
    encode_prompt,
    left_padded,
    null_prompt,
)
from jaxft.tasks.image_tokens.opened import ImageModel, open_folder
from jaxft.verify import rounding
from jaxft.verify.autoencoder import certify as certify_tokenizer
from jaxft.verify.autoencoder import vq_subject
from jaxft.verify.component import check, load
from jaxft.verify.llm import certify as certify_language_model
from jaxft.verify.report import (
    Check,
    certificate,
    loading,
    round_trip,
    same_weights,
    start,
    worst_gradient,
)
from jaxft.weights.rules import to_torch

DRAWN_CAPTIONS = (
    "a red apple on a table",
    "water",
    "two people and a small dog in front of a house",
)
DRAWN_GUIDANCE, MOST_CODES = 3.0, 24  # MOST_CODES: most codes of a sampled image


class JanusOracle(NamedTuple):
    """Results of stock transformers on a Janus in fp32.

    rounding: that of the loss. gradients: by torch key. distances: differences of the gradients
    under other roundings. weights: digests by torch key.
    """

    loss: float
    rounding: float
    gradients: dict[str, np.ndarray]
    distances: dict[str, float]
    weights: dict[str, str]
    drawn: Int[np.ndarray, "B S"]
    report: Mapping[str, Any]


def certify(spec: str, far: int) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of an image-token folder.

    For family N, the language model's certificate is included. `far` is its first far position.
    """
    model = open_folder(spec)
    oracles = ("torch", "transformers")
    start(oracles)
    with jax.default_matmul_precision("highest"):
        if isinstance(model, JanusFolder):
            about, checks = _janus(model)
        else:
            about, checks = _unified(spec, model, far)
    return certificate(spec, checks, oracles, about), checks


# ---- family N -----------------------------------------------------------------------------


def _unified(spec: str, model: ImageModel, far: int) -> tuple[dict[str, Any], list[Check]]:
    about, checks = certify_language_model(spec, far)
    tokenizer, more = certify_tokenizer(str(Path(spec).expanduser() / "vq"))
    leaves = _leaves(model)
    count = min(MOST_CODES, model.layout.count)
    theirs = _unified_codes(model, count)
    drawn = _differing(_draw(model, leaves, load(model.part, leaves), count), theirs)
    about = {"language_model": about, "tokenizer": tokenizer["components"]}
    return about, [*checks, *more, drawn]


def _unified_codes(model: Any, count: int) -> Int[np.ndarray, "B S"]:
    import torch
    from transformers import AutoModelForCausalLM

    layout = model.layout
    stock: Any = AutoModelForCausalLM.from_pretrained(
        model.source.folder, dtype=torch.float32, trust_remote_code=False
    )
    tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in _prompts(model))
    made = stock.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        guidance_scale=DRAWN_GUIDANCE,
        negative_prompt_ids=torch.tensor([[layout.null, layout.boi]] * len(tokens)),
        suppress_tokens=list(range(layout.image_offset)),
        pad_token_id=layout.pad,
    )
    return made[:, tokens.shape[1] :].numpy() - layout.image_offset


# ---- family J -----------------------------------------------------------------------------


def _janus(model: JanusFolder) -> tuple[dict[str, Any], list[Check]]:
    found = check(vq_subject(model.vq.source, model.vq.cfg))
    leaves, count = _leaves(model), min(MOST_CODES, model.layout.count)
    rows = _rows(model)
    oracle = _ask(model, rows, count)
    params = load(model.part, leaves)
    checks = [*found.checks, *loading("transformers", oracle.report)]
    keyed = _torch_keyed(model, leaves, params)
    checks.append(same_weights("weights, differing tensors", keyed, oracle.weights))
    checks += _gradients(model, leaves, params, rows, oracle)
    checks.append(_differing(_draw(model, leaves, params, count), oracle.drawn))
    trip, digest = round_trip("round trip, differing tensors", model.part, leaves, params)
    return {"weights_sha256": digest, "components": {"tokenizer": found.about}}, [*checks, trip]


def _rows(model: ImageModel) -> dict[str, np.ndarray]:
    """Return prompts, padded to the limit, and random codes.

    The caption of the last row is dropped.
    """
    layout = model.layout
    prompts = [encode_prompt(layout, model.tokenizer, caption).ids for caption in DRAWN_CAPTIONS]
    captions = np.full((len(prompts), layout.max_caption_tokens), layout.pad, np.int32)
    for row, ids in enumerate(prompts):
        captions[row, : len(ids)] = ids
    rng = np.random.default_rng(0)
    codes = rng.integers(0, layout.codes, (len(prompts), layout.count), np.int32)
    dropped = np.arange(len(prompts)) == len(prompts) - 1
    return {
        "captions": captions,
        "lengths": np.array([len(ids) for ids in prompts], np.int32),
        "codes": codes,
        "dropped": dropped,
    }


def _ask(model: JanusFolder, rows: Mapping[str, np.ndarray], count: int) -> JanusOracle:
    """Return the composed loss of transformers' modules row by row, and the codes of `generate`."""
    import torch
    from transformers import JanusForConditionalGeneration

    loaded: Any = JanusForConditionalGeneration.from_pretrained(
        model.source.folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    stock, report = loaded
    stock.eval()
    # torch gives the pad token's row no gradient, but the null prompt consists of pads.
    stock.model.language_model.embed_tokens.padding_idx = None
    weights, losses = rounding.digests(stock), _losses(stock, model, rows)
    losses.mean().backward()
    gradients = rounding.gradients_of(stock)
    drawn = _their_codes(stock, model, count)
    own, loss, distances = 0.0, losses.mean().item(), {}
    for _ in rounding.variants(stock, gradients, distances):
        again = _losses(stock, model, rows)
        again.mean().backward()
        own = max(own, (again - losses).abs().mean().item())
    return JanusOracle(loss, own, gradients, distances, weights, drawn, report)


def _losses(stock: Any, model: JanusFolder, rows: Mapping[str, np.ndarray]) -> Any:
    """Return the cross-entropy of each code, row by row: a torch tensor [B, S]."""
    import torch

    layout, losses = model.layout, []
    for ids, length, codes, drop in zip(*rows.values(), strict=True):
        prompt = ids[:length].tolist()
        if drop:
            prompt = [token if token == layout.bos else layout.pad for token in prompt]
        losses.append(_row_loss(stock, [*prompt, layout.boi], codes))
    return torch.stack(losses)


def _their_codes(stock: Any, model: JanusFolder, count: int) -> Int[np.ndarray, "B S"]:
    """Return the greedy codes of `generate`."""
    import torch

    stock.model.vision_model.config.num_image_tokens = count
    stock.generation_config.generation_kwargs = {"boi_token_id": model.layout.boi}
    stock.generation_config.bos_token_id = model.layout.bos
    stock.generation_config.pad_token_id = model.layout.pad
    tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in _prompts(model))
    how = {"generation_mode": "image", "guidance_scale": DRAWN_GUIDANCE, "do_sample": False}
    return stock.generate(tokens, attention_mask=mask, **how).numpy()


def _row_loss(stock: Any, prompt: list[int], codes: np.ndarray) -> Any:
    import torch

    inner, wanted = stock.model, torch.from_numpy(codes.astype(np.int64))
    text = inner.language_model.embed_tokens(torch.tensor([prompt]))
    images = stock.prepare_embeddings_for_image_generation(wanted[None, :-1])
    hidden = inner.language_model(inputs_embeds=torch.cat([text, images], 1)).last_hidden_state
    logits = inner.generation_head(hidden[0, len(prompt) - 1 :])
    # In float64, as a language model's loss: torch's own rounding of it is large on some CPUs.
    return torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="none")


def _gradients(
    model: JanusFolder,
    leaves: Mapping[str, Leaf],
    params: Params,
    rows: Mapping[str, np.ndarray],
    oracle: JanusOracle,
) -> list[Check]:
    template = jax.eval_shape(model.build, jax.random.key(0))

    def objective(params: Params) -> jax.Array:
        code_model = model.code_model(bind(template, params))
        made = train_rows(model.layout, *map(jnp.asarray, rows.values()))
        embeds = code_model.embed(made.tokens, made.images, jnp.float32)
        hidden = code_model.decoder.hidden(embeds=embeds)[0]
        before = jnp.take_along_axis(hidden, made.places[..., None], axis=1)
        even = jnp.full(made.image_targets.shape, 1 / made.image_targets.size)
        return code_model.cross_entropy(before, made.image_targets, even, 0.0)[0]

    step = jax.jit(jax.value_and_grad(objective), compiler_options=runtime.compiler_options())
    loss, grads = step(params)
    keyed = _torch_keyed(model, leaves, grads)
    worst = worst_gradient("gradients, worst relative", keyed, oracle.gradients, oracle.distances)
    apart, bound = abs(float(loss) - oracle.loss), rounding.bound(oracle.rounding, oracle.loss)
    return [Check("loss, abs", apart, bound, f"{oracle.loss:.6f}", oracle.rounding), worst]


def _torch_keyed(
    model: JanusFolder, leaves: Mapping[str, Leaf], arrays: Params
) -> Iterator[tuple[str, np.ndarray]]:
    part = model.part
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys):
            array = np.asarray(arrays[entry.path])
            yield key, to_torch(array[entry.place(i)], entry.layout, part.sizes)


# ---- both ---------------------------------------------------------------------------------


def _leaves(model: ImageModel) -> dict[str, Leaf]:
    return describe(jax.eval_shape(model.build, jax.random.key(0)))


def _prompts(model: ImageModel) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, mask) of the captions alone, padded on the left to the longest."""
    layout = model.layout
    prompts = [encode_prompt(layout, model.tokenizer, caption).ids for caption in DRAWN_CAPTIONS]
    tokens, mask = left_padded(layout, prompts)
    width = max(map(len, prompts)) + 1
    return tokens[:, -width:], mask[:, -width:]


def _draw(
    model: ImageModel, leaves: Mapping[str, Leaf], params: Params, count: int
) -> Int[np.ndarray, "B S"]:
    template = jax.eval_shape(model.build, jax.random.key(0))
    prompts = [
        encode_prompt(model.layout, model.tokenizer, caption).ids for caption in DRAWN_CAPTIONS
    ]
    nulls = [null_prompt(model.layout, ids) for ids in prompts]
    tokens, mask = map(jnp.asarray, left_padded(model.layout, [*prompts, *nulls]))
    keys = jax.random.split(jax.random.key(0), len(prompts))

    @partial(jax.jit, compiler_options=runtime.compiler_options(loop=True))
    def call(params: Params) -> jax.Array:
        code_model = model.code_model(bind(template, params))
        return generate_codes(
            code_model, tokens, mask, keys,
            count=count, guidance=DRAWN_GUIDANCE, how=Sampling(), dtype=jnp.float32,
        )  # fmt: skip

    return np.asarray(call(params))


def _differing(ours: np.ndarray, theirs: np.ndarray) -> Check:
    wrong = int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.size
    return Check(
        "greedy codes, differing", wrong, 0, f"of {theirs.size}, guidance {DRAWN_GUIDANCE:g}"
    )
