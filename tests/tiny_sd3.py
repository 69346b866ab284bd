"""Tiny random pipelines of Stable Diffusion 3 as diffusers saves them, with T5 and without."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny_pipelines import make_tokenizer, shaken, text_encoder

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # what diffusers wants to be told
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 40,
    "out_channels": 4,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def make_t5_tokenizer():
    """One token a letter, as T5's tokenizers make of words that they do not know; its size."""
    letters = [(chr(i), -float(i)) for i in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *letters]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = T5TokenizerFast(tokenizer_object=made, **names, extra_ids=0, model_max_length=512)
    assert isinstance(fast, PreTrainedTokenizerFast)
    return fast, len(pieces)


def make_t5(words):
    """A random encoder of T5 v1.1, width 48."""
    config = T5Config(
        vocab_size=words,
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return shaken(T5EncoderModel(config))


def make_flow_vae(scale, shift):
    """A VAE of 4 channels with a shift and no quant convolutions, not `shaken` yet."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sharpened(denoiser):
    """Attention to hundreds of tokens of text would hardly depend on the queries."""
    with torch.no_grad():
        for name, tensor in denoiser.named_parameters():
            tensor.mul_(4.0 if ".norm_q" in name or ".norm_added_q" in name else 1.0)
    return denoiser


def make_sd3(work, t5=True, shift=3.0, **transformer):
    """A StableDiffusion3Pipeline; saves nothing but a tokenizer's files."""
    torch.manual_seed(0)
    tokenizer, vocab = make_tokenizer(work / "tokens")
    vae = make_flow_vae(1.5305, 0.0609)
    wider = {"hidden_act": "gelu", "hidden_size": 24, "projection_dim": 24}
    third = third_tokenizer = None
    if t5:
        third_tokenizer, words = make_t5_tokenizer()
        third = make_t5(words)
    denoiser = sharpened(shaken(SD3Transformer2DModel(**{**TRANSFORMER, **transformer})))
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=shaken(vae),
        text_encoder=text_encoder(vocab, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(vocab, CLIPTextModelWithProjection, **wider),
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )
