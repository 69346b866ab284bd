"""Conversations in shared rows against one a row: each one's loss, and the gradients."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxft.core.params import bind
from jaxft.core.sharding import place_batch
from jaxft.core.step import sample_keys
from jaxft.kernels.attention import attention, blockwise_attention, splash_attention
from tests import whole as runs
from tests.conftest import LINES
from tests.kernels.attention.test_cudnn_attention import packed as cudnn_stand_in

ROWS, SEQ_LEN, WINDOW = 12, 160, 11
PATHS = ("formula", "blockwise", "many blocks", "splash", "cudnn")


@pytest.fixture(scope="module")
def folders(chat_folder, tmp_path_factory):
    """The same weights without a window, and with one that is shorter than most conversations."""
    windowed = tmp_path_factory.mktemp("windowed") / "model"
    shutil.copytree(chat_folder, windowed)
    config = json.loads((windowed / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (windowed / "config.json").write_text(json.dumps({**config, "sliding_window": WINDOW}))
    return {None: chat_folder, WINDOW: windowed}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Conversations of one to three rounds, every second one after a system turn."""
    file, rows = tmp_path_factory.mktemp("rows") / "chat.jsonl", []
    for i in range(ROWS):
        turns = [{"role": "system", "content": "Be brief."}] * (i % 2)
        for j in range(1 + i % 3):
            turns.append({"role": "user", "content": f"{i} {j}?"})
            turns.append({"role": "assistant", "content": LINES[(i + j) % 5][: 8 + 3 * i]})
        rows.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(rows))
    return file


@pytest.fixture(scope="module")
def open_chat(make_config, folders, conversations, quick):
    """`open_chat(window, pack)`: a run on the conversations."""

    def run(window, pack):
        places = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{conversations}")
        keys = {"lora.rank": 0, "batch_size": ROWS, "seq_len": SEQ_LEN, "pack": pack}
        return runs.open_run(make_config(folders[window], {**places, **keys}))

    return run


@pytest.fixture(scope="module")
def alone(open_chat):
    """Losses and gradients of one conversation a row, by window."""
    return {window: losses_and_gradients(open_chat(window, False)) for window in (None, WINDOW)}


@pytest.fixture
def calls(request, monkeypatch):
    """Attention is computed in the given way, and each of its calls is listed here."""
    ways = {
        "formula": (attention, "blockwise_attention", by_formula),
        "splash": (
            splash_attention,
            "splash_attention",
            partial(splash_attention.splash_attention, interpret=True),
        ),
        "cudnn": (cudnn, "dot_product_attention", cudnn_stand_in),
    }
    room, name, function = ways.get(
        request.param, (attention, "blockwise_attention", attention.blockwise_attention)
    )
    made = []

    def count(*args, **how):
        made.append(args[0].shape)
        return function(*args, **how)

    monkeypatch.setattr(room, name, count)
    if request.param in ("splash", "cudnn"):
        monkeypatch.setattr(attention, "choose", lambda q, soft_cap, sinks: request.param)
    if request.param == "many blocks":
        for name, value in (("CPU_SCORES", 1), ("SMALLEST_SPAN", 8), ("SMALLEST_BLOCK", 8)):
            monkeypatch.setattr(blockwise_attention, name, value)
    return made


def by_formula(q, k, v, queries, keys, *, causal, window, scale, soft_cap, sinks, in_order):
    """All scores at once, masked by the coordinates."""
    queries = jax.tree.map(lambda x: x[:, :, None], queries)
    keys = jax.tree.map(lambda x: x[:, None], keys)
    mask = blockwise_attention.attention_mask(queries, keys, causal=causal, window=window)
    return attention.reference(q, k, v, mask, scale, soft_cap, sinks)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("calls", PATHS, indirect=True)
def test_t10_a_packed_conversation_has_the_loss_and_gradients_of_its_own_row(
    alone, open_chat, calls, window
):
    losses, grads, rows = losses_and_gradients(open_chat(window, True))
    wanted, want, count = alone[window]
    assert calls and rows < count == ROWS == len(losses)
    for example, loss in wanted.items():
        assert losses[example] == pytest.approx(loss, rel=1e-5)
    for key, grad in want.items():
        error = np.linalg.norm(grads[key] - grad) / np.linalg.norm(grad)
        assert error < 1e-5, f"{key}: gradient differs by {error:.1e}"


def losses_and_gradients(run):
    """The summed loss of each conversation by its tokens, gradients of the whole, and rows."""
    batch, losses = next(run.train.batches(0, slice(0, ROWS))), {}

    def loss(params, batch):
        model = bind(run.opened.template, params)
        return run.objective.loss(model, batch, sample_keys(0, 0, batch["sample_ids"]), 0)[0][0]

    step, only = jax.jit(jax.value_and_grad(loss)), jax.jit(loss)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        total, grads = step(params, place_batch(batch, run.mesh))
        for row, ids in enumerate(batch["segment_ids"]):
            for segment in set(ids.tolist()) - {0}:
                weights = np.zeros_like(batch["weights"])
                weights[row] = batch["weights"][row] * (ids == segment)
                one = place_batch({**batch, "weights": weights}, run.mesh)
                losses[tuple(batch["tokens"][row, ids == segment])] = float(only(params, one))
    assert sum(losses.values()) == pytest.approx(float(total), rel=1e-5)
    return losses, grads, len(batch["tokens"])
