"""Conversations as a user of TRL would train them; `bench.py chat` runs it.

python tools/trl_chat_peer.py FOLDER ROWS.jsonl STEPS BATCH LR [ADAPTER]

Rows are read in the order of the file. The last line is JSON with the loss of every step.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl_peer import Progress

# The turn of SmolLM2's template, and the same with the marks that assistant_only_loss needs.
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


class Losses(Progress):
    """The loss of every step, beside the lines of progress."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, settings: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.found += [logs["loss"]] if logs and "loss" in logs else []


def main(folder: str, file: str, steps: int, batch: int, lr: float, adapter: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = tokenizer.chat_template
    if TURN not in template:
        raise SystemExit(f"{folder} has another chat template than SmolLM2")
    tokenizer.chat_template = template.replace(TURN, MARKED)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    losses = Losses()
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_length=1024,
            assistant_only_loss=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[losses],
        ).train()
    print(json.dumps({"losses": losses.found}))


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), *sys.argv[6:])
