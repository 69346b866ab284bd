"""A tiny random Janus as transformers saves it, tokenizer and processor included."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from tests.tiny_image_tokens import make_pictures

CODES, GRID, FACTOR = 24, 6, 2
SIZE = GRID * FACTOR
WIDTH = 32
SPECIALS = ["<bos>", "<eos>", "<unk>", "<｜▁pad▁｜>"]
IMAGES = ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"]
PRO_1B, PRO_7B = (24, 2048, 5632, 16), (30, 4096, 11008, 32)
LINES = ["a red cat", "the blue house of a person", "water", "two small trees, and bread"]


def make_config(**changes):
    text = LlamaConfig(
        vocab_size=320, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=GRID * 16,
        patch_size=16, num_image_tokens=GRID**2, projection_dim=WIDTH, mlp_ratio=2.0,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=4, num_embeddings=CODES, latent_channels=8, base_channels=32,
        channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=WIDTH,
        image_token_embed_dim=WIDTH, initializer_range=0.04,
    )  # fmt: skip
    config = {"text_config": text, "vision_config": vision, "vq_config": vq, "image_token_id": 4}
    return JanusConfig(**{**config, "tie_word_embeddings": False, **changes})


def published(layers, width, ffn, heads):
    """The config of a release."""
    text = LlamaConfig(
        vocab_size=102400, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=16384,
    )  # fmt: skip
    vq = JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width)
    return JanusConfig(
        text_config=text, vision_config=JanusVisionConfig(projection_dim=width), vq_config=vq,
        tie_word_embeddings=False,
    )  # fmt: skip


def make_model(**changes):
    """Random weights at which norms and biases matter and codes are far apart."""
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(make_config(**changes))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
            if name.startswith("model.generation_"):
                tensor.add_(0.3 * torch.randn_like(tensor))
        model.model.vqmodel.quantize.embedding.weight.normal_()
        model.model.vqmodel.quant_conv.weight.mul_(20.0)  # so that many codes are in use
    return model.float().eval()


def make_tokenizer(folder):
    """Byte-level, with Janus's special tokens, a BOS before everything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS + IMAGES, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos", "eos", "unk", "pad"), SPECIALS, strict=True))
    config = {f"{name}_token": token for name, token in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    config |= {"image_token": IMAGES[0], "boi_token": IMAGES[1], "eoi_token": IMAGES[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_janus_model(folder, **changes):
    """The whole folder: weights, tokenizer, and a preprocessor of CLIP's colours."""
    make_model(**changes).save_pretrained(folder)
    make_tokenizer(folder)
    colours = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    content = {"image_processor_type": "JanusImageProcessor", **colours}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    (folder / "LICENSE").write_text("free\n")
    return folder


def make_work(folder):
    """A folder with such a model and captioned pictures to train it on."""
    make_pictures(folder / "pictures")
    make_janus_model(folder / "model")
    return folder
