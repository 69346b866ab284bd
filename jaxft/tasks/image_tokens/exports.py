"""Exports of an image-token model: its folder, an adapter, or a Janus in its authors' layout."""

from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders import janus_original


def side_files(job: Job, rewritten: set[str]) -> writers.SideFiles:
    """Return configs, tokenizer, layout and the VQ tokenizer's folder."""
    return job.opened.model.side_files(writers.stated_dtype(job))


def _write_adapter(job: Job) -> None:
    writers.write_adapter(job, side_files(job, {""}))


def _write_original(job: Job) -> None:
    """Write a Janus under the tensor names of its authors."""
    files = job.opened.model.original_files(writers.stated_dtype(job))
    (part,) = writers.parts(job)
    made = janus_original.original(writers.merged(job, part))
    size = writers.SHARD_BYTES[part.stem]
    write_sharded(job.folder, made.tensors, made.infos, size, part.stem)
    writers.copy(files, job.folder)


WRITERS = {
    "folder": Writer(lambda job: writers.write_folder(job, side_files)),
    "adapter": writers.adapter(_write_adapter),
    "original": Writer(_write_original),
}
