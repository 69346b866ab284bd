"""Names of an MMDiT's modules in single files of Stable Diffusion 3 and 3.5."""

from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.weights.folders.single_file import UNET_PREFIX, LDMLayout
from jaxft.weights.views import THIRDS

MMDIT_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
MMDIT_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# Modules of the file that hold queries, keys and values, in this order along the rows.
MMDIT_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def mmdit_layout(cfg: MMDiTConfig) -> LDMLayout:
    """Return the layout of the transformer in a single file.

    Modulations of two chunks are (shift, scale) in the file, and (scale, shift) in diffusers.
    """
    names, rows = dict(MMDIT_ENDS), {}
    for i in range(cfg.num_layers):
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        names |= {ours + one: theirs + other for one, other in MMDIT_BLOCK.items()}
        for fused, modules in MMDIT_QKV.items():
            pairs = zip(modules, THIRDS, strict=True)
            rows |= {ours + one: (theirs + fused, third) for one, third in pairs}
    last = f"transformer_blocks.{cfg.num_layers - 1}.norm1_context.linear"
    return LDMLayout(UNET_PREFIX, names, rows=rows, swapped=("norm_out.linear", last))
