"""Fine-tune Stable Diffusion 1.x to 3.x, FLUX.1, FLUX.2 klein or Z-Image, or the demo pipeline.

    python -m jaxft.train --config configs/diffusion.py --workdir runs/diffusion

Train a LoRA on your own pipeline and pictures (a folder with metadata.jsonl, or .txt captions):

    python -m jaxft.train --config configs/diffusion.py --workdir runs/mine --config.model=PATH \
        --config.data.train=folder:images --config.data.eval=folder:held-out \
        --config.resolution=512 --config.buckets=True --config.lora.rank=16 \
        --config.total=2000_steps

`--config.base=nf4` (or int8) holds the frozen weights below a LoRA in 4 (or 8) bits.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="diffusion",
            model="demo:emoji-sd",  # a diffusers folder, a single .safetensors, or a hub id
            init="pretrained",
            seed=0,
            total="60_steps",
            batch_size=16,
            micro_batches=1,
            resolution=64,
            buckets=False,  # keep aspect ratios instead of cropping to squares
            data=dict(train="demo:emoji/train", eval="demo:emoji/valid"),
            cache="runs/cache",  # moments and embeddings, by content; "" computes them every step
            caption_dropout=0.1,
            min_snr_gamma=0.0,  # 0 is off, 5.0 is usual
            sample=dict(prompts=(), steps=20, guidance=4.0),
            trainable="",  # empty: the adapters when lora.rank > 0, else the denoiser
            lora=dict(rank=0, alpha=16.0, targets=""),  # empty: the denoiser's attention
            optim=dict(
                name="adamw",
                lr=3e-5,
                schedule="cosine",
                warmup="10_steps",
                weight_decay=0.0,
                clip=1.0,
                ema=0.0,
            ),
            compute_dtype="auto",
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="10_steps", eval="0_steps", save="100_steps", sample="0_steps"),
            export=dict(kind="folder", dtype="source"),
        )
    )
