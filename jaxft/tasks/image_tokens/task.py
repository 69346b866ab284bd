"""Image-token models (DALL-E): a language model that continues a caption with an image's codes."""

from jaxft.objectives.codes import CodePrediction
from jaxft.tasks import Planned, Task
from jaxft.tasks.image_tokens.exports import WRITERS
from jaxft.tasks.image_tokens.opened import OpenedImageModel
from jaxft.tasks.image_tokens.preview import ImageTokenPreview
from jaxft.tasks.image_tokens.rows import CodeRows, encode, planned, read_rows


def _objective(opened: OpenedImageModel, rows: CodeRows | Planned) -> CodePrediction:
    length = rows.width + opened.layout.count
    return CodePrediction(
        opened.layout,
        opened.model.code_model,
        opened.dtype,
        opened.options.loss,
        caption_dropout=opened.options.caption_dropout,
        dropout=bool(opened.cfg.lora.dropout),
        image_flops=length * opened.model.flops_per_token(length),
    )


IMAGE_TOKENS = Task(
    open=OpenedImageModel,
    read=read_rows,
    plan=planned,
    encode=encode,
    objective=_objective,
    preview=ImageTokenPreview,
    writers=WRITERS,
)
