"""Small and published UNets of diffusers."""

import torch
from diffusers import UNet2DConditionModel

SDXL_LEVELS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
# The published files, short as they are, and the numbers of their tensors and parameters.
FULL = {
    "sd15": ({"cross_attention_dim": 768}, 686, 859_520_964),
    "sd21": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
            "num_class_embeds": None,
        },
        686,
        865_910_724,
    ),
    "sdxl": (
        {
            **SDXL_LEVELS,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        1680,
        2_567_463_684,
    ),
}
SMALL = {
    "cross_attention_dim": 24,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TINY = {  # one level, attention in the middle alone
    **SMALL,
    "block_out_channels": [64],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
SHRUNK = {
    "sd15": SMALL,
    "sd21": {
        **SMALL,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **SMALL,
        **SDXL_LEVELS,
        "down_block_types": SDXL_LEVELS["down_block_types"][:2],
        "up_block_types": SDXL_LEVELS["up_block_types"][1:],
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


def make_torch(config):
    """diffusers' random UNet, its norms and biases moved off one and zero."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return theirs
