"""LDM's names of the modules of Stable Diffusion, and the opening of folders and single files."""

from collections.abc import Iterator
from dataclasses import replace

from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.models.denoisers.flux.flux2_single_file import flux2_layout
from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.models.denoisers.flux.flux_single_file import flux_layout
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.models.denoisers.mmdit.mmdit_single_file import mmdit_layout
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.denoisers.zimage.zimage_config import ZImageConfig
from jaxft.models.denoisers.zimage.zimage_single_file import zimage_layout
from jaxft.models.pipelines import flow_files
from jaxft.models.pipelines.flow_files import FLUX_VAE
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import VISION, CLIPTextConfig
from jaxft.weights.folders.diffusers import Pipeline, Tables, open_pipeline
from jaxft.weights.folders.single_file import (
    TEXT_PREFIXES,
    UNET_PREFIX,
    LDMLayout,
    as_diffusers,
    open_single_file,
)
from jaxft.weights.folders.single_file import VAE_PREFIX as FIRST_STAGE

SINGLE = (".safetensors", ".ckpt", ".pt", ".bin")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# By diffusers' old and new names. Of two names of one module, reading uses the last.
VAE_ATTENTION = {
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "group_norm": "norm",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def open_model(
    spec: str, weights: bool = True, prediction: str | None = None, nf4: Tables | None = None
) -> Pipeline:
    """Open a diffusers folder, `pip:` package or hub id (see `open_pipeline`), or a single file.

    The components of a single file have diffusers' keys and shapes, like those of a folder. nf4: as
    in `open_pipeline`.
    """
    if not spec.endswith(SINGLE):
        return open_pipeline(spec, weights, nf4)
    if (tensors := flow_files.open_flow_tensors(spec)) is not None:
        base = flow_files.folder_of(spec, tensors)
        return flow_files.open_flow_file(spec, tensors, base, layouts(base), weights)
    pipeline = open_single_file(spec, weights, prediction)
    if not weights:
        return pipeline
    components = {
        name: replace(pipeline.components[name], tensors=as_diffusers(source.tensors, layout))
        for name, layout in layouts(pipeline).items()
        if (source := pipeline.components[name]).tensors is not None
    }
    return replace(pipeline, components=components)


def kind(pipeline: Pipeline) -> str:
    """Return the layout of a pipeline's single file: "sd1", "sd2", or the family of others."""
    if "transformer" in pipeline.components:
        return pipeline.family
    if "text_encoder_2" in pipeline.components:
        return "sdxl"
    act = pipeline.components["text_encoder"].config.get("hidden_act", "quick_gelu")
    return "sd1" if act == "quick_gelu" else "sd2"


def layouts(pipeline: Pipeline) -> dict[str, LDMLayout]:
    """Return the single-file layout of every component of the file, by its config.

    A file of a transformer holds no text encoders, as those of Stability AI.
    """
    configs = {name: source.config for name, source in pipeline.components.items()}
    if "transformer" in configs:
        decoder = vae_layout(VAEConfig.from_hf(configs["vae"]))
        if pipeline.family == "sd3":
            denoiser = mmdit_layout(MMDiTConfig.from_hf(configs["transformer"]))
            return {"transformer": denoiser, "vae": decoder}
        if pipeline.family == "flux":
            denoiser = flux_layout(FluxConfig.from_hf(configs["transformer"]))
        elif pipeline.family == "flux2":
            denoiser = flux2_layout(Flux2Config.from_hf(configs["transformer"]))
        else:
            denoiser = zimage_layout(ZImageConfig.from_hf(configs["transformer"]))
        return {"transformer": denoiser, "vae": decoder._replace(prefix=FLUX_VAE)}
    made = {
        "unet": unet_layout(UNetConfig.from_hf(configs["unet"])),
        "vae": vae_layout(VAEConfig.from_hf(configs["vae"])),
    }
    for name, prefix in TEXT_PREFIXES[kind(pipeline)].items():
        projects = name == "text_encoder_2"
        cfg = CLIPTextConfig.from_hf(configs[name], projects, f"{name}/config.json")
        made[name] = clip_layout(cfg, prefix)
    return made


def transformer_layouts(pipeline: Pipeline) -> dict[str, LDMLayout]:
    """Return the layout of a transformer, by its component. {} for a pipeline with a UNet."""
    found = layouts(pipeline) if "transformer" in pipeline.components else {}
    return {name: layout for name, layout in found.items() if name == "transformer"}


def unet_layout(cfg: UNetConfig) -> LDMLayout:
    """Return the UNet's layout: input_blocks and output_blocks are numbered through all levels."""
    names = dict(UNET_ENDS)
    for ours, theirs in _unet_blocks(cfg):
        if ".resnets." in ours:
            names |= {f"{ours}.{one}": f"{theirs}.{other}" for one, other in RESNET.items()}
        else:
            names[ours] = theirs
    return LDMLayout(UNET_PREFIX, names)


def _unet_blocks(cfg: UNetConfig) -> Iterator[tuple[str, str]]:
    top, block = len(cfg.channels) - 1, 1  # input_blocks.0 is conv_in
    for level, count in enumerate(cfg.layers):
        down = f"down_blocks.{level}"
        for i in range(count):
            yield f"{down}.resnets.{i}", f"input_blocks.{block}.0"
            yield f"{down}.attentions.{i}", f"input_blocks.{block}.1"
            block += 1
        if level < top:
            yield f"{down}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
            block += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    block = 0
    for place, count in enumerate(reversed(cfg.layers)):
        up = f"up_blocks.{place}"
        for i in range(count + 1):
            yield f"{up}.resnets.{i}", f"output_blocks.{block}.0"
            yield f"{up}.attentions.{i}", f"output_blocks.{block}.1"
            block += 1
        if place < top:
            # LDM has the upsampler in the last block of a level, after resnet and attention.
            after = 2 if cfg.up_attends[place] else 1
            yield f"{up}.upsamplers.0.conv", f"output_blocks.{block - 1}.{after}.conv"


def vae_layout(cfg: VAEConfig) -> LDMLayout:
    """Return the VAE's layout.

    The decoder's levels are numbered from the image. Attention is made of 1x1 convolutions.
    """
    names, arrows = {}, {}
    top = len(cfg.widths) - 1
    for side in ("encoder", "decoder"):
        mid, attn = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names |= {f"{mid}.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        for ours, theirs in VAE_ATTENTION.items():
            names[f"{attn}.{ours}"] = f"{side}.mid.attn_1.{theirs}"
            if ours != "group_norm":
                arrows[f"{attn}.{ours}.weight"] = "o i 1 1 -> o i"
    for level in range(top + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{top - level}"
        names[f"{down}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        names[f"{up}.upsamplers.0"] = f"decoder.up.{level}.upsample"
        for i in range(cfg.layers + 1):
            names[f"{down}.resnets.{i}"] = f"encoder.down.{level}.block.{i}"
            names[f"{up}.resnets.{i}"] = f"decoder.up.{level}.block.{i}"
    resnets = {ours: theirs for ours, theirs in names.items() if ".resnets." in ours}
    for ours, theirs in resnets.items():
        names[f"{ours}.conv_shortcut"] = f"{theirs}.nin_shortcut"
    if cfg.norm_eps is not None:  # the names of FLUX.2's VAE
        names |= {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    # Losses and averages of LDM's training, which no program reads.
    return LDMLayout(FIRST_STAGE, names, arrows, ignore=r"(loss|model_ema)\..*")


def clip_layout(cfg: CLIPTextConfig, prefix: str) -> LDMLayout:
    """Return the layout of a text encoder.

    Keys that begin with `…transformer.` have transformers' names. Keys that begin with `…model.`
    have open_clip's names, with q, k and v fused.
    """
    if prefix.endswith("transformer."):
        return LDMLayout(prefix, {}, ignore=VISION)
    names = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for i in range(cfg.num_layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= {f"{ours}.{one}": f"{theirs}.{other}" for one, other in OPEN_CLIP.items()}
    # SD 2 uses the output of the last layer but one, so the file's last block is not used.
    ignore = "|".join((r"attn_mask|.*position_ids", *clip.ignore(cfg)))
    ignore = rf"{ignore}|transformer\.resblocks\.{cfg.num_layers}\..*"
    if cfg.projection_dim is None:
        return LDMLayout(prefix, names, fused=True, ignore=ignore)
    names["text_projection.weight"] = "text_projection"
    return LDMLayout(prefix, names, {"text_projection.weight": "d p -> p d"}, True, ignore)
