"""Fine-tune an image-token model (DALL-E style), by default the demo model on new words.

    python -m jaxft.train --config configs/image_tokens.py --workdir runs/image_tokens

Train your own text model to generate the codes of a VQ tokenizer, on your own pictures (a folder
with metadata.jsonl, or captions in .txt):

    python -m jaxft.train --config configs/image_tokens.py --workdir runs/mine --config.model=PATH \
        --config.graft=VQ_FOLDER --config.data.train=folder:images --config.data.eval=folder:held \
        --config.resolution=128 --config.optim.lr=1e-4 --config.total=20000_steps \
        --config.sample.guidance=3.0 --config.sample.temperature=1.0
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="image_tokens",
            model="demo:emoji-tokens",
            init="pretrained",
            seed=0,
            total="40_steps",
            batch_size=16,
            micro_batches=1,
            resolution=64,
            tokenizer="",  # another VQ folder than the model's vq/, of the same codes
            graft="",  # a VQ folder: `model` is a text model that learns its codes
            data=dict(train="demo:stickers/train", eval="demo:stickers/valid"),
            cache="runs/cache",  # the pictures' codes, by content and tokenizer
            caption_dropout=0.1,
            sample=dict(prompts=(), guidance=1.0, temperature=0.0, top_k=0),
            trainable="",  # empty: the adapters when lora.rank > 0, else everything
            optim=dict(
                name="adamw",
                lr=1.5e-4,
                schedule="cosine",
                warmup="5_steps",
                weight_decay=0.05,
                clip=1.0,
                b1=0.9,
                b2=0.95,
                ema=0.0,
            ),
            compute_dtype="auto",
            param_dtype="float32",
            remat="auto",
            mesh=dict(data=1, fsdp=-1, tensor=1),
            every=dict(log="10_steps", eval="0_steps", save="40_steps", sample="0_steps"),
            export=dict(kind="folder", dtype="source"),
        )
    )
