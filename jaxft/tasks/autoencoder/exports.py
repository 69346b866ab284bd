"""The export of an autoencoder: its folder."""

from jaxft.models.autoencoders.vq_config import JANUS
from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.weights.folders import transformers
from jaxft.weights.folders.transformers import export_config


def side_files(job: Job, rewritten: set[str]) -> writers.SideFiles:
    """Return config.json, licence and card, and the weights if they did not change."""
    codec, source = job.opened.codec, job.opened.source
    assert source.folder is not None
    kept = transformers.side_files(source.folder)
    if "vae." not in rewritten:
        return {**kept, **source.side_files}
    if codec.kind == JANUS:
        config = export_config(source.config, writers.stated_dtype(job))
    else:  # diffusers keeps no dtype in a config.json
        config = {"_class_name": codec.kind, **source.config}
    return {**kept, "config.json": writers.dump(config)}


def _write_folder(job: Job) -> None:
    params = job.opened.codec.exported(dict(job.params))
    writers.write_folder(job._replace(params=params), side_files)


WRITERS = {"folder": Writer(_write_folder)}
