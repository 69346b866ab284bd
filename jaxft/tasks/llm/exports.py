"""Exports of a language model: the merged folder, or its adapter."""

from contextlib import suppress

from jaxft.core.errors import UserError
from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.tasks.llm.opened import eos_ids
from jaxft.weights.folders.transformers import export_config


def side_files(job: Job, rewritten: set[str]) -> writers.SideFiles:
    """Return configs, tokenizer, licence and card of the exported model.

    The stop tokens of the chat template are added to those of generation_config.json.
    """
    opened = job.opened
    source, files = opened.source, dict(opened.source.side_files)
    config = export_config(source.config, writers.stated_dtype(job))
    if config != source.config or opened.kept:
        files["config.json"] = writers.dump(config)
    ends, own = source.generation_config, opened.tokenizer.eos_token_id
    known = eos_ids(ends.get("eos_token_id") or config.get("eos_token_id"))
    stops = [own] if source.tokenizer else []  # otherwise generate ignores the adapter's EOS
    with suppress(UserError):  # a template that fails has no part in a run on plain texts
        stops += opened.chat.style.stops if opened.chat else ()
    if missing := [token for token in dict.fromkeys(stops) if token not in known]:
        files["generation_config.json"] = writers.dump({**ends, "eos_token_id": [*missing, *known]})
    if opened.chat and opened.chat.name == opened.options.chat:  # a file, not the checkpoint's own
        files["chat_template.jinja"] = opened.chat.template.encode()
    return files


def _write_adapter(job: Job) -> None:
    writers.write_adapter(job, side_files(job, {""}))


WRITERS = {
    "merged": Writer(lambda job: writers.write_folder(job, side_files)),
    "adapter": writers.adapter(_write_adapter),
}
