"""Tiny random pipelines as diffusers saves them, for the tests of everything that reads one."""

import json
from itertools import chain

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
LEVELS = {
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 44,
        "cross_attention_dim": 40,
        "use_linear_projection": True,
    },
}


def make_tokenizer(folder):
    """CLIP's tokenizer without a single merge, in `folder`; and the size of its vocabulary."""
    letters = [chr(i) for i in chain(range(33, 127), range(161, 173), range(174, 256))]
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    made = CLIPTokenizer(vocab=str(vocab), merges=str(merges), model_max_length=77)
    return made, len(words)


def text_encoder(vocab, cls=CLIPTextModel, **changes):
    config = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "projection_dim": 16,
    }
    return shaken(cls(CLIPTextConfig(**{**config, **changes})))


def shaken(model):
    """Biases and norms are not all zeros and ones, so that each tensor matters."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.float().eval()


def make_pipeline(work, family="sd", prediction="epsilon", text=None, **unet):
    """A StableDiffusionPipeline ("sd") or StableDiffusionXLPipeline ("sdxl"); saves nothing."""
    torch.manual_seed(0)
    tokenizer, vocab = make_tokenizer(work / "tokens")
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    parts = {
        "vae": shaken(vae),
        "unet": shaken(UNet2DConditionModel(**{**UNET, **LEVELS[family], **unet})),
        "text_encoder": text_encoder(vocab, **(text or {})),
        "tokenizer": tokenizer,
    }
    if family == "sd":
        scheduler = DDIMScheduler(
            **BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
        )
        return StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    wider = {"hidden_act": "gelu", "hidden_size": 24, "projection_dim": 20}
    second = text_encoder(vocab, CLIPTextModelWithProjection, **wider)
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction)
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=tokenizer, scheduler=scheduler
    )
