"""Exports of a language model: the merged folder, its adapter, or one GGUF file."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE
from jaxft.models.decoders import gguf
from jaxft.models.decoders.classifier import ADAPTER_CONFIG, class_name
from jaxft.models.decoders.config import DecoderConfig
from jaxft.tasks import Job, Writer
from jaxft.tasks.common import writers
from jaxft.tasks.llm.opened import eos_ids
from jaxft.weights.adapters import peft
from jaxft.weights.adapters.ranks import scale
from jaxft.weights.files import gguf_writer
from jaxft.weights.files.gguf_table import stored_shapes, stored_tensors
from jaxft.weights.files.gguf_vocabulary import vocabulary
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
    files = side_files(job, {""})
    writers.write_adapter(job, files, kind)
    if job.opened.labels:
        writers.copy({ADAPTER_CONFIG: files["config.json"]}, job.folder)


# general.file_type
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "MXFP4": 38}
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "README")


def _metadata(job: Job, infos: gguf_writer.Announced) -> dict[str, Any]:
    """Return the metadata of a GGUF file. `infos` are its tensors."""
    opened, sizes = job.opened, dict.fromkeys(FILE_TYPES, 0)
    for shape, kind in infos.values():
        sizes[kind] += math.prod(shape)
    chat, stops = opened.chat, opened.stop_ids()
    with suppress(UserError):  # a template that fails has no part in a run on plain texts
        stops = opened.stop_ids(chat)
    made = {
        "general.architecture": gguf.gguf_architecture(opened.source.config, opened.model_cfg).name,
        "general.type": "model",
        "general.name": job.name,
        "general.size_label": _size_label(sum(sizes.values())),
        "general.file_type": FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])],
        "general.quantization_version": 2,
        **gguf.model_metadata(opened.source.config, opened.model_cfg),
        **vocabulary(opened.tokenizer, opened.model_cfg.vocab_size, stops, opened.source.name),
    }
    own = chat.template if chat else opened.tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    return {**made, "tokenizer.chat_template": own} if own else made


def _size_label(count: int) -> str:
    """Return a number of parameters as llama.cpp writes it: 135M, 1.5B."""
    power = next((n for n in (12, 9, 6) if count > 10**n), 3)
    scaled = count / 10**power
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{'KMBT'[power // 3 - 1]}"


def _write_gguf(job: Job, quantised: str) -> None:
    """Write the merged model as one file. Matrices are rounded once, from float32.

    quantised: the type of matrices, "" for that of the dtype. The head has 8 bits at least, because
    its errors go into the logits alone.
    """
    opened, (part,) = job.opened, writers.parts(job)
    cfg, config = opened.model_cfg, opened.source.config
    entry, sizes = gguf.gguf_architecture(config, cfg), _sizes(cfg)
    stated, exact = (writers.merged(one, part) for one in (job, job._replace(dtype="float32")))
    # Frequencies of rope in old files, and what encodes pictures, have no name in the table.
    texts = {gguf.text_key(key): info for key, info in stated.infos.items()}
    shapes = stored_shapes(entry, {key: shape for key, (shape, _) in texts.items()}, sizes)
    dtypes = {
        name: np.dtype(dtype)
        for key, (_, dtype) in texts.items()
        for name, _, _ in entry.placed(key)
    }
    kinds = _matrix_types(job, quantised, shapes)
    infos = {
        name: (shape, gguf_writer.type_name(name, shape, dtypes[name], kinds[name]))
        for name, shape in shapes.items()
    }
    factors = gguf.rope_factors(config, cfg)
    infos |= {name: (array.shape, "F32") for name, array in factors.items()}
    arrays = ((gguf.text_key(key), array) for key, array in exact.tensors)
    tensors = chain(factors.items(), stored_tensors(entry, arrays, shapes, sizes))
    if jax.process_index():  # making a tensor may gather an array from all processes
        for _ in tensors:
            pass
        return
    metadata = _metadata(job, infos)
    gguf_writer.write_gguf(job.folder / f"{job.name}.gguf", metadata, infos, tensors)
    files = side_files(job, {""})
    writers.copy({x: y for x, y in files.items() if x.startswith(LICENCES)}, job.folder)


def _sizes(cfg: DecoderConfig) -> dict[str, int]:
    return {"n": cfg.num_heads, "k": cfg.num_kv_heads, "u": 2}


def _matrix_types(job: Job, quantised: str, names: Iterable[str]) -> dict[str, str]:
    """Return the type of each matrix, "" for that of its dtype.

    Experts that were read from MXFP4 and are not trained have the same values in it again.
    """
    kinds = dict.fromkeys(names, quantised)
    if quantised:
        kinds["token_embd.weight" if job.opened.model_cfg.tied else "output.weight"] = "Q8_0"
    trained = any(".experts." in path for path in job.chosen)
    if job.opened.source.decoded_from == "MXFP4" and job.dtype == "source" and not trained:
        kinds |= {name: "MXFP4" for name in kinds if name.endswith("_exps.weight")}
    return kinds


def _write_gguf_adapter(job: Job) -> None:
    """Write the low-rank factors as one file.

    llama.cpp adds alpha / rank * B A of each matrix, with one alpha. Another scale is put into B.
    Raises: UserError for parameters that such a file cannot hold.
    """
    opened, (part,) = job.opened, writers.parts(job)
    lora, cfg = opened.cfg.lora, opened.model_cfg
    entry = gguf.gguf_architecture(opened.source.config, cfg)
    ranks = {slot.module: peft.size(slot, lora) for slot in peft.slots(part, job.leaves)}
    arrays: dict[str, np.ndarray] = {}
    more = [path for path in job.chosen if job.leaves[path].role != ADAPTER_ROLE]
    for key, array in peft.factors(part, job.leaves, writers.adapters(job), lora):
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        own, line, _ = next(entry.placed(gguf.text_key(f"{module}.weight")), ("", None, None))
        if line is None or own.startswith("token_embd") or factor not in ("lora_A", "lora_B"):
            more.append(key)
            continue
        if factor == "lora_B":
            size = ranks[module]
            one = replace(lora, rank=size.rank, alpha=size.alpha)
            array = array * np.float32(scale(one) * size.rank / lora.alpha)
            array = line.stored(array, _sizes(cfg))
        arrays[f"{own}.{factor.lower()}"] = array
    if more or part.kept:
        raise UserError(
            f"export.kind='gguf-adapter' holds the low-rank factors of projections, not"
            f" {next(iter([*more, *part.kept]))}; use export.kind='gguf'"
        )
    metadata = {
        "general.architecture": entry.name,
        "general.type": "adapter",
        "general.name": job.name,
        "general.file_type": FILE_TYPES["F32"],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(lora.alpha),
    }
    if not jax.process_index():
        infos = {key: (array.shape, "F32") for key, array in arrays.items()}
        gguf_writer.write_gguf(job.folder / f"{job.name}.gguf", metadata, infos, arrays.items())


WRITERS = {
    "merged": Writer(lambda job: writers.write_folder(job, side_files)),
    "adapter": writers.adapter(_write_adapter),
    "gguf": Writer(lambda job: _write_gguf(job, quantised="")),
    "gguf-q8_0": Writer(lambda job: _write_gguf(job, quantised="Q8_0")),
    "gguf-q4_0": Writer(lambda job: _write_gguf(job, quantised="Q4_0")),
    "gguf-adapter": writers.adapter(_write_gguf_adapter),
}
