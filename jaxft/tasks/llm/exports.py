"""Exports of a language model: the merged folder, or its adapter."""

import json
from contextlib import suppress
from pathlib import Path

from jaxft.core.errors import UserError
from jaxft.models.decoders.classifier import class_name
from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.tasks.llm.opened import eos_ids
from jaxft.weights.folders.transformers import export_config


def head_files(job: Job) -> dict[str, bytes]:
    """Return config.json and tokenizer_config.json of a sequence classifier.

    transformers reads the score at the last token that is not padding. Both files thus name the
    padding that training used, even if it was the end of a text.
    """
    opened, tokenizer = job.opened, job.opened.tokenizer
    names = {str(i): name for i, name in enumerate(opened.labels)}
    config = {
        **export_config(opened.source.config, writers.stated_dtype(job)),
        "architectures": [class_name(opened.source.config)],
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
        "problem_type": None if opened.options.pairs else opened.options.problem_type,
        "pad_token_id": opened.pad_id,
    }
    files = {"config.json": writers.dump(config)}
    if tokenizer.pad_token_id is None:
        folder = Path(opened.source.tokenizer_dir())
        stated = json.loads((folder / "tokenizer_config.json").read_bytes())
        padding = tokenizer.convert_ids_to_tokens(opened.pad_id)
        files["tokenizer_config.json"] = writers.dump({**stated, "pad_token": padding})
    return files


def side_files(job: Job, rewritten: set[str]) -> writers.SideFiles:
    """Return configs, tokenizer, licence and card of the exported model.

    The stop tokens of the chat template are added to those of generation_config.json.
    """
    opened = job.opened
    source, files = opened.source, dict(opened.source.side_files)
    with suppress(UserError):  # a template that fails has no part in a run on plain texts
        if opened.chat and opened.chat.name == opened.options.chat:  # a file of the user
            files["chat_template.jinja"] = opened.chat.template.encode()
    if opened.labels:
        return {**files, **head_files(job)}
    config = export_config(source.config, writers.stated_dtype(job))
    if config != source.config or opened.kept:
        files["config.json"] = writers.dump(config)
    ends, own = source.generation_config, opened.tokenizer.eos_token_id
    known = eos_ids(ends.get("eos_token_id") or config.get("eos_token_id"))
    stops = [own] if source.tokenizer else []  # otherwise generate ignores the adapter's EOS
    with suppress(UserError):
        stops += opened.chat.style.stops if opened.chat else ()
    if missing := [token for token in dict.fromkeys(stops) if token not in known]:
        files["generation_config.json"] = writers.dump({**ends, "eos_token_id": [*missing, *known]})
    return files


def _write_adapter(job: Job) -> None:
    kind = "SEQ_CLS" if job.opened.labels else "CAUSAL_LM"
    writers.write_adapter(job, side_files(job, {""}), kind)


WRITERS = {
    "merged": Writer(lambda job: writers.write_folder(job, side_files)),
    "adapter": writers.adapter(_write_adapter),
}
