"""Names of FLUX.1's modules in single files: those of Black Forest Labs, and of ComfyUI."""

from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.weights.folders.single_file import UNET_PREFIX, LDMLayout
from jaxft.weights.views import THIRDS, RowSpan

FLUX_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
# Modules of the file that hold several of diffusers', by their rows.
FLUX_DOUBLE_ROWS = {
    "img_attn.qkv": dict(zip(("attn.to_q", "attn.to_k", "attn.to_v"), THIRDS, strict=True)),
    "txt_attn.qkv": dict(
        zip(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), THIRDS, strict=True)
    ),
}
FLUX_SINGLE_ROWS = {  # the MLP is four times as wide as q, k and v
    "linear1": {
        "attn.to_q": RowSpan(0, 1, 7),
        "attn.to_k": RowSpan(1, 2, 7),
        "attn.to_v": RowSpan(2, 3, 7),
        "proj_mlp": RowSpan(3, 7, 7),
    }
}


def flux_layout(cfg: FluxConfig) -> LDMLayout:
    """Return the layout of the transformer in a single file.

    The modulation of the output is (shift, scale) in the file, and (scale, shift) in diffusers.
    """
    names, rows = dict(FLUX_ENDS), {}
    doubles = [(f"transformer_blocks.{i}.", f"double_blocks.{i}.") for i in range(cfg.num_layers)]
    singles = [
        (f"single_transformer_blocks.{i}.", f"single_blocks.{i}.") for i in range(cfg.num_single)
    ]
    for blocks, plain, fused in (
        (doubles, FLUX_DOUBLE, FLUX_DOUBLE_ROWS),
        (singles, FLUX_SINGLE, FLUX_SINGLE_ROWS),
    ):
        for ours, theirs in blocks:
            names |= {ours + one: theirs + other for one, other in plain.items()}
            for module, parts in fused.items():
                rows |= {ours + one: (theirs + module, own) for one, own in parts.items()}
    return LDMLayout(UNET_PREFIX, names, rows=rows, swapped=("norm_out.linear",))
