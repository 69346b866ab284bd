"""Names of Z-Image's modules in single files: those of its own code, and of ComfyUI."""

from jaxft.models.denoisers.zimage.zimage_config import ZImageConfig
from jaxft.weights.folders.single_file import UNET_PREFIX, LDMLayout
from jaxft.weights.views import THIRDS

ZIMAGE_ENDS = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "cap_embedder.1": "cap_embedder.1",
}
ZIMAGE_BLOCK = {
    "attention.norm_q.weight": "attention.q_norm.weight",
    "attention.norm_k.weight": "attention.k_norm.weight",
    "attention.to_out.0": "attention.out",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
    "adaLN_modulation.0": "adaLN_modulation.0",
}
ZIMAGE_ROWS = dict(zip(("attention.to_q", "attention.to_k", "attention.to_v"), THIRDS, strict=True))


def zimage_layout(cfg: ZImageConfig) -> LDMLayout:
    """Return the layout of the transformer in a single file, where q, k and v are one module."""
    names, rows = dict(ZIMAGE_ENDS), {}
    stacks = {
        "noise_refiner": cfg.num_refiners,
        "context_refiner": cfg.num_refiners,
        "layers": cfg.num_layers,
    }
    for block in (f"{stack}.{i}." for stack, count in stacks.items() for i in range(count)):
        names |= {block + ours: block + theirs for ours, theirs in ZIMAGE_BLOCK.items()}
        rows |= {block + one: (block + "attention.qkv", own) for one, own in ZIMAGE_ROWS.items()}
    # Some files have a norm that no program uses.
    return LDMLayout(UNET_PREFIX, names, rows=rows, ignore=r"norm_final\.weight")
