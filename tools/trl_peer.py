"""The job of configs/llm.py as a user of TRL + PEFT would write it; `bench.py finetune` runs it.

python tools/trl_peer.py FOLDER STEPS ROWS
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

DEMO = Path(__file__).resolve().parent.parent / "jaxft" / "demo" / "supersense"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Progress(TrainerCallback):
    def on_step_end(self, settings: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 10 == 0 or state.global_step == state.max_steps:
            print(f"step {state.global_step}/{state.max_steps}", flush=True)


def main(folder: str, steps: int, rows: int) -> None:
    """What a user of TRL + PEFT would write for the job, on the same rows; prints accuracies."""
    train, valid = (_prompts(split) for split in ("train", "valid"))
    chosen = np.sort(np.random.default_rng(0).permutation(len(valid))[:rows])
    valid = [valid[i] for i in chosen]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    before = accuracy(model, tokenizer, train, valid)
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=1e-3,
            max_length=64,
            completion_only_loss=True,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list(train),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"
            ),
            callbacks=[Progress()],
        )
        trainer.train()
    after = accuracy(trainer.model, tokenizer, train, valid)
    print(json.dumps({"accuracy_before": before, "accuracy_after": after}))


def _prompts(split: str) -> list[dict[str, str]]:
    rows = map(json.loads, (DEMO / f"{split}.jsonl").read_text().splitlines())
    return [
        {
            "prompt": f"Definition: {row['text']}\nCategory:",
            "completion": f" {row['label']}",
        }
        for row in rows
    ]


def accuracy(model: Any, tokenizer: Any, train: list[dict], valid: list[dict]) -> float:
    """The share of rows whose label has the likeliest first token of all labels."""
    labels = sorted({row["completion"] for row in train + valid})
    ids = tokenizer(labels, add_special_tokens=False)["input_ids"]
    if len({row[0] for row in ids}) < len(labels):
        raise SystemExit("two labels begin with the same token; this tokenizer does not fit")
    firsts, right = torch.tensor([row[0] for row in ids]), 0
    model.eval()
    for start in range(0, len(valid), 16):
        rows = valid[start : start + 16]
        prompts = [row["prompt"] for row in rows]
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, 0, firsts]
        picked = [labels[i] for i in logits.argmax(-1).tolist()]
        right += sum(p == row["completion"] for p, row in zip(picked, rows, strict=True))
    return right / len(valid)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
