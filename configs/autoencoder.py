"""Fine-tune the autoencoder of Stable Diffusion, by default the decoder of the demo VAE on emoji.

    python -m jaxft.train --config configs/autoencoder.py --workdir runs/autoencoder

Fine-tune your own VAE on your own images, with a discriminator from step 2000 on:

    python -m jaxft.train --config configs/autoencoder.py --workdir runs/mine --config.model=PATH \
        --config.data.train=folder:images --config.data.eval=folder:held-out \
        --config.resolution=256 --config.total=20000_steps --config.loss.adversarial=0.5 \
        --config.loss.adversarial_start=2000_steps
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="autoencoder",
            model="demo:emoji-sd",  # a VAE's folder, or that of a whole pipeline
            init="pretrained",
            seed=0,
            total="200_steps",
            batch_size=8,
            micro_batches=1,
            resolution=64,
            data=dict(train="demo:emoji/train", eval="demo:emoji/valid"),
            eval_examples=0,  # 0 is all
            # The decoder alone: latents and tokens that were made before stay valid.
            trainable=r"vae\.(decoder|post_quant_conv)\..*|discriminator\..*",
            perceptual="demo:efficientnet-lite0",  # or a file of VGG16 and LPIPS weights
            loss=dict(
                l1=1.0,
                l2=0.0,
                perceptual=0.5,
                kl=1e-6,  # of a VAE; a VQ tokenizer has commitment=0.25 and revive=0.0
                adversarial=0.0,
                adversarial_start="0_steps",
            ),
            optim=dict(
                name="adamw",
                lr=2e-4,
                schedule="cosine",
                warmup="10_steps",
                weight_decay=0.0,
                clip=1.0,
                b1=0.9,
                b2=0.95,
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
