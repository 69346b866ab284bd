"""Stable Diffusion: fine-tuning UNet and text encoders on captioned pictures, whole or by LoRA."""

from jaxft.objectives.denoising import Denoising
from jaxft.tasks import Planned, Task
from jaxft.tasks.diffusion.exports import WRITERS
from jaxft.tasks.diffusion.opened import OpenedPipeline
from jaxft.tasks.diffusion.preview import DiffusionPreview
from jaxft.tasks.diffusion.rows import PictureRows, encode, planned, read_rows


def _objective(opened: OpenedPipeline, rows: PictureRows | Planned) -> Denoising:
    options = opened.options
    return Denoising(
        opened.model_cfg,
        opened.process,
        opened.dtype,
        rows.empty_ids,
        empty_text=rows.empty_text,
        unread=rows.unread,
        caption_dropout=options.caption_dropout,
        noise_offset=options.noise_offset,
        dropout=bool(opened.cfg.lora.dropout),
        image_flops=opened.image_flops(),
    )


DIFFUSION = Task(
    open=OpenedPipeline,
    read=read_rows,
    plan=planned,
    encode=encode,
    objective=_objective,
    preview=DiffusionPreview,
    writers=WRITERS,
)
