"""Fine-tune Janus or Janus-Pro text-to-image (family J). Set --config.model: there is no demo.

    python -m jaxft.train --config configs/janus.py --workdir runs/janus --config.model=FOLDER \
        --config.data.train=folder:images --config.data.eval=folder:held

The default trains LoRA on the language model, and the table, aligner and head of the codes whole.
It exports a PEFT folder. Train all image-generating parts, and export a folder for
JanusForConditionalGeneration of transformers:

    python -m jaxft.train --config configs/janus.py --workdir runs/whole --config.model=FOLDER \
        --config.data.train=folder:images --config.data.eval=folder:held --config.lora.rank=0 \
        --config.trainable=.* --config.optim.lr=1e-5 --config.export.kind=folder
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="image_tokens",
            model="",  # a JanusForConditionalGeneration's folder
            init="pretrained",
            seed=0,
            total="1000_steps",
            batch_size=8,
            micro_batches=1,
            resolution=384,  # what a Janus draws; family N has other sizes
            data=dict(train="", eval=""),
            cache="runs/cache",  # the pictures' codes, by content and tokenizer
            caption_dropout=0.1,
            sample=dict(prompts=(), guidance=5.0, temperature=1.0),
            trainable=r".*\.lora_[ab]|generation_.*",
            lora=dict(rank=32, alpha=64.0, targets=r"language_model\..*_proj"),
            optim=dict(
                name="adamw",
                lr=1e-4,
                schedule="cosine",
                warmup="30_steps",
                weight_decay=0.0,
                clip=1.0,
                b1=0.9,
                b2=0.95,
            ),
            compute_dtype="auto",
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="10_steps", eval="0_steps", save="100_steps", sample="0_steps"),
            export=dict(kind="adapter", dtype="source"),
        )
    )
