"""Names of FLUX.2's modules in single files: those of Black Forest Labs, and of ComfyUI."""

from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.models.denoisers.flux.flux_single_file import FLUX_DOUBLE_ROWS
from jaxft.weights.folders.single_file import UNET_PREFIX, LDMLayout

FLUX2_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX2_DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX2_SINGLE = {
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}


def flux2_layout(cfg: Flux2Config) -> LDMLayout:
    """Return the layout of the transformer in a single file.

    The modulation of the output is (shift, scale) in the file, and (scale, shift) in diffusers.
    """
    names, rows = dict(FLUX2_ENDS), {}
    for i in range(cfg.num_layers):
        ours, theirs = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        names |= {ours + one: theirs + other for one, other in FLUX2_DOUBLE.items()}
        for module, parts in FLUX_DOUBLE_ROWS.items():
            rows |= {ours + one: (theirs + module, own) for one, own in parts.items()}
    for i in range(cfg.num_single):
        ours, theirs = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        names |= {ours + one: theirs + other for one, other in FLUX2_SINGLE.items()}
    return LDMLayout(UNET_PREFIX, names, rows=rows, swapped=("norm_out.linear",))
