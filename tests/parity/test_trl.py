"""Steps on conversations beside TRL's SFTTrainer, which trains the answers alone."""

import json

import jax
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from jaxft.data.loader import sample_order
from tests.conftest import CHATML, LINES
from tests.parity.test_training import jax_steps

BATCH, STEPS, LR, SEED = 8, 4, 1e-3, 0
# TRL needs marks around the tokens to train. jaxft finds these by itself.
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)


@pytest.fixture(scope="module")
def conversations():
    """Conversations of one to three rounds of unequal lengths."""
    made = []
    for i in range(32):
        turns = [{"role": "system", "content": "Be brief."}] * (i % 2)
        for j in range(1 + i % 3):
            turns.append({"role": "user", "content": f"{i} {j}?"})
            turns.append({"role": "assistant", "content": LINES[(i + j) % 5][: 8 + i]})
        made.append({"messages": turns})
    return made


@pytest.fixture(scope="module")
def theirs(chat_folder, conversations, tmp_path_factory):
    """The loss of each step of TRL on the rows that jaxft draws, in that order."""
    order = sample_order(len(conversations), SEED)
    rows = [conversations[int(order[i])] for i in range(STEPS * BATCH)]
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    assert tokenizer.chat_template == CHATML and "endgeneration" in MARKED
    tokenizer.chat_template = MARKED
    settings = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, max_length=160, assistant_only_loss=True, logging_steps=1,
        train_sampling_strategy="sequential", gradient_checkpointing=False, save_strategy="no",
        report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
    trainer = SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    losses = []
    trainer.log = lambda logs, *_: losses.append(logs["loss"]) if "loss" in logs else None
    trainer.train()
    return losses


@pytest.mark.parametrize("pack", [False, True])
def test_the_steps_of_sft_trainer(
    make_config, chat_folder, conversations, theirs, tmp_path, monkeypatch, quick, pack
):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in conversations))
    keys = dict.fromkeys(("data.train", "data.eval"), f"jsonl:{file}")
    keys |= {"lora.rank": 0, "batch_size": BATCH, "seq_len": 160, "pack": pack, "seed": SEED}
    keys |= {"optim.lr": LR, "optim.schedule": "constant", "optim.warmup": "0_steps"}
    rows, ours, _, _ = jax_steps(make_config(chat_folder, keys), tmp_path, STEPS)
    assert (max(rows) < BATCH) == pack
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
