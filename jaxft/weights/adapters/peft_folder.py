"""PEFT folders as PEFT, Unsloth and axolotl save them, opened together with their base model."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.guards.inside import refuse_outside
from jaxft.weights.adapters.ranks import AdapterSize, described
from jaxft.weights.files.tensor_files import TensorFiles, Tensors
from jaxft.weights.folders.transformers import (
    HEAD,
    TABLE,
    TOKENIZER_FILES,
    Source,
    members_hint,
    open_source,
)
from jaxft.weights.rules import Entry, in_class
from jaxft.weights.views import Overlaid, Renamed

CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
PEFT_PREFIX = "base_model.model."
ADAPTER_STEM = "adapter_model"
UNSUPPORTED = (  # fields of PEFT's LoraConfig that compute something else than W + scale * A B
    "modules_to_save",
    "bias",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MERGE = (
    "merge it into its base once with PEFT (PeftModel.from_pretrained(…).merge_and_unload(), then"
    " save_pretrained), and give that folder"
)
GIVE_BASE = "give its base by model=MODEL and the adapter by lora.from=FOLDER"
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base too
TOKEN_DELTA = ".token_adapter.trainable_tokens_delta"
MAGNITUDES = "magnitude_vector"
FACTOR = re.compile(
    rf"(.+)\.lora_(A|B|{MAGNITUDES})(?:\.[^.]+)?\.weight"
)  # an adapter's name may be inside
WRAPPERS = re.compile(r"(?:^module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece*", "chat_template*", "*.tiktoken"),
)


class PeftAdapter(NamedTuple):
    """A PEFT folder: its LoRA settings, the name of its base model, its tensors.

    Names of tensors are without PEFT's prefix. `fit` renames them by the base's modules, keeps only
    the factors, and sets the targets, ranks and layers of `lora` by them. `ranks` and `alphas` are
    PEFT's patterns. `token_ids` are the rows of the embedding that it trains.
    `saved` is PEFT's modules_to_save, and `ties` its ensure_weight_tying.
    """

    name: str
    base: str
    lora: Lora
    tensors: Tensors
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    token_ids: tuple[int, ...] = ()
    saved: tuple[str, ...] = ()
    ties: bool = False

    def size(self, module: str) -> AdapterSize:
        """Return rank and alpha of a module, by the first pattern that matches its name."""
        found = []
        for pattern, default in ((self.ranks, self.lora.rank), (self.alphas, self.lora.alpha)):
            keys = (key for key in pattern if re.match(rf"(.*\.)?({key})$", module))
            found.append(pattern.get(next(keys, ""), default))
        return AdapterSize(int(found[0]), float(found[1]))


class AdaptedSource(NamedTuple):
    """A model, and the adapter on it if the user named one.

    `kept` names the tensors of the source that come from the adapter's file, such as resized
    embeddings.
    """

    source: Source
    adapter: PeftAdapter | None = None
    kept: tuple[str, ...] = ()


def open_adapted(
    spec: str,
    adapter: str = "",
    weights: bool = True,
    opener: Callable[[str, bool], Source] = open_source,
    whole: Sequence[str] | None = (),
) -> AdaptedSource:
    """Open a model by `opener`, and a PEFT folder on it.

    `adapter` names the PEFT folder, and `spec` its base model. Without `adapter`, `spec` may itself
    be a PEFT folder, whose config names the base. Tokenizer, chat template and whole tensors of the
    folder replace those of the base. `whole`: as in `read`.
    Raises: UserError for an adapter that is not plain LoRA, and for models that `opener` refuses.
    """
    folder, base = (adapter, spec) if adapter else (spec, "")
    if not is_adapter(folder):
        if adapter:
            hint = members_hint(Path(adapter).expanduser()) or "give a folder of PEFT's"
            raise UserError(f"lora.from={adapter!r}: no {CONFIG} there; {hint}")
        return AdaptedSource(opener(spec, weights))
    if base and is_adapter(base):
        raise UserError(f"model={base!r} is an adapter too; give the model below it to lora.from")
    found = read(Path(folder).expanduser(), base, whole)
    base_source = _open_base(found, weights, opener)
    names = {in_class(key, base_source.class_names): key for key in found.tensors.keys()}  # noqa: SIM118
    found = found._replace(tensors=Renamed(found.tensors, names))
    source, kept = _laid_over(found, base_source)
    return AdaptedSource(_with_tokenizer(source, Path(folder).expanduser()), found, kept)


def is_adapter(spec: str) -> bool:
    """Return True if a model's name is a PEFT folder."""
    return (Path(spec).expanduser() / CONFIG).is_file()


def read(folder: Path, base: str = "", whole: Sequence[str] | None = ()) -> PeftAdapter:
    """Read a PEFT folder.

    `base` replaces the base that its config names. `whole` names the modules that it may hold
    beside the factors (PEFT's modules_to_save). None allows all.
    Raises: UserError for an adapter that is more than LoRA or DoRA, or not complete.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a readable PEFT adapter config: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a JSON object, found a {type(config).__name__}")
    plain = (None, False, {}, [], "none")
    unsupported = [key for key in UNSUPPORTED if config.get(key) not in plain]
    if whole is None or set(config.get("modules_to_save") or ()) <= set(whole):
        unsupported = [key for key in unsupported if key != "modules_to_save"]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type={config.get('peft_type')}"
        raise UserError(f"{file}: {what} is not supported; plain LoRA adapters are: {MERGE}")
    if gone := [key for key in ("r", "lora_alpha") if not config.get(key)]:
        raise UserError(f"{file} has no {', '.join(gone)}; add them to the file")
    base = base or config.get(BASE) or ""
    if not base:
        raise UserError(f"{file} has no {BASE}; {GIVE_BASE}")
    beside = folder / base
    if not Path(base).expanduser().exists() and beside.exists():
        base = str(beside.resolve())
    lora = Lora(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora", False)),
        dropout=float(config.get("lora_dropout") or 0.0),
        dora=bool(config.get("use_dora", False)),
    )
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    tensors = _tensors(folder)
    ids = _token_ids(file, config.get("trainable_token_indices") or (), tensors)
    saved, ties = tuple(config.get("modules_to_save") or ()), config.get("ensure_weight_tying")
    return PeftAdapter(str(folder), base, lora, tensors, ranks, alphas, ids, saved, bool(ties))


def _token_ids(file: Path, stated: Any, tensors: Tensors) -> tuple[int, ...]:
    """Return the rows of the embedding that an adapter trains.

    Raises: UserError for rows of another table. A tied head has the same rows and no tensor.
    """
    by_module = stated if isinstance(stated, dict) else {"embed_tokens": stated}
    named = {name.rsplit(".", 1)[-1]: tuple(ids) for name, ids in by_module.items()}
    ids = named.get("embed_tokens", ())
    others = [key for key in tensors.keys() if key.endswith(TOKEN_DELTA)]  # noqa: SIM118
    others = [key for key in others if not key.endswith(f"embed_tokens{TOKEN_DELTA}")]
    if others or any(one != ids for one in named.values()):
        raise UserError(
            f"{file}: trainable_token_indices={stated} names rows of other modules than the input"
            f" embedding, which is not supported; {MERGE}"
        )
    return ids


def _tensors(folder: Path) -> Tensors:
    """Return the adapter's tensors, named without PEFT's prefix and those of training wrappers."""
    file, pickle = folder / f"{ADAPTER_STEM}.safetensors", folder / f"{ADAPTER_STEM}.bin"
    if not file.exists() and pickle.exists():
        raise UserError(
            f"{pickle}: pickle files can run code and are refused; convert it once where PyTorch is"
            ' installed: python -c "import torch, safetensors.torch as st; st.save_file({k:'
            f" v.clone().contiguous() for k, v in torch.load('{pickle}', map_location='cpu',"
            f" weights_only=True).items()}}, '{file}')\""
        )
    if not file.exists():
        raise UserError(f"{folder} has {CONFIG} but no {file.name}; copy the file there")
    tensors, names = TensorFiles.open(file), {}
    for key in list(tensors.keys()):
        if ".lora_embedding_" in key:
            raise UserError(f"{folder}: {key} adapts an embedding, which is not supported; {MERGE}")
        name = WRAPPERS.sub("", key).replace(".token_adapter.base_layer.", ".")
        name = name.replace(".base_layer.", ".")
        name += ".weight" if name.endswith(f".lora_{MAGNITUDES}") else ""
        while name.startswith(PEFT_PREFIX):
            name = name.removeprefix(PEFT_PREFIX)
        if factor := FACTOR.fullmatch(name):
            name = f"{factor[1]}.lora_{factor[2]}.weight"
        if name in names:
            raise UserError(f"{file}: {names[name]} and {key} are the same tensor {name}")
        names[name] = key
    return Renamed(tensors, names)


def fit(adapter: PeftAdapter, entries: Iterable[Entry]) -> PeftAdapter:
    """Return the adapter with its factors named by the base's modules, and their paths as targets.

    `entries` are the plan of the base. Targets and layers follow from the tensors and not from the
    config: target_modules may be a list, a pattern or "all-linear", and layers_to_transform may
    leave layers out.
    Raises: UserError for factors without a place in the base, or if there are none.
    """
    entries = list(entries)
    kernels = {
        entry.path.removesuffix(".kernel"): [key.removesuffix(".weight") for key in entry.keys]
        for entry in entries
        if entry.path.endswith(".kernel")
    }
    paths = {module: path for path, modules in kernels.items() for module in modules}
    names, odd, adapted = {}, [], set[str]()
    for key in adapter.tensors.keys():  # noqa: SIM118
        factor = FACTOR.fullmatch(key)
        module = _aligned(factor[1], paths) if factor else None
        if factor and module:
            names[f"{module}.lora_{factor[2]}.weight"] = key
            adapted.add(module)
        elif factor:
            odd.append(key)
        elif key.endswith(TOKEN_DELTA):
            tables = [name.removesuffix(".weight") for entry in entries for name in entry.keys]
            names[f"{_aligned(key.removesuffix(TOKEN_DELTA), tables)}{TOKEN_DELTA}"] = key
    if odd or not adapted:
        what = f"projections that {adapter.base} lacks: {', '.join(odd[:8])}" if odd else "no LoRA"
        tied = f" (a tied head has none of its own; {MERGE})" if "lm_head" in what else ""
        raise UserError(f"{adapter.name} holds {what}{tied}; {GIVE_BASE}")
    none = AdapterSize(0, adapter.lora.alpha)
    found = [
        (path, [adapter.size(one) if one in adapted else none for one in modules])
        for path, modules in sorted(kernels.items())
        if adapted.intersection(modules)
    ]
    lora = replace(adapter.lora, targets="|".join(re.escape(path) for path, _ in found))
    return adapter._replace(lora=described(lora, found), tensors=Renamed(adapter.tensors, names))


def _aligned(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is equal to `name` but for a leading "model.", or None.

    An adapter that was trained on the bare decoder lacks this prefix.
    """
    spelled = (name, f"model.{name}", name.removeprefix("model."))
    return next((one for one in spelled if one in set(known)), None)


def base_name(spec: str) -> str:
    """Return the name of a base for an adapter's config. A path becomes absolute."""
    path = Path(spec).expanduser()
    return str(path.absolute()) if path.exists() else spec


# ---- the base -----------------------------------------------------------------------------


def _open_base(
    adapter: PeftAdapter, weights: bool, opener: Callable[[str, bool], Source]
) -> Source:
    try:
        return opener(adapter.base, weights)
    except UserError as error:
        name = adapter.base.lower()
        qlora = "quantised" in str(error) or re.search(r"bnb|[48]-?bit|gptq|awq", name)
        hint = "; an adapter trained on a quantised base (QLoRA) lies on the full model as well"
        raise UserError(
            f"{adapter.name}/{CONFIG}: {BASE}={adapter.base!r} does not open ({error}); {GIVE_BASE}"
            f"{hint if qlora else ''}"
        ) from None


def _laid_over(adapter: PeftAdapter, source: Source) -> tuple[Source, tuple[str, ...]]:
    """Return the base with the whole tensors of the adapter's file, as PEFT loads them.

    Tensors equal to the base's are left out. An embedding with another number of rows changes
    vocab_size.
    Returns: the base, and the keys of the tensors that were replaced.
    Raises: UserError for a tensor without a place in the base, and for an untied head on a base
    that ties it.
    """
    if source.tensors is None:
        return source, ()
    tensors, theirs = source.tensors, adapter.tensors
    known = {in_class(key, source.class_names): key for key in tensors.keys()}  # noqa: SIM118
    table: dict[str, str] = {}
    tied = bool(source.config.get("tie_word_embeddings")) or HEAD not in known
    for key in theirs.keys():  # noqa: SIM118
        if FACTOR.fullmatch(key) or key.endswith(TOKEN_DELTA):
            continue
        name = known.get(_aligned(key, known) or "")
        if tied and key == HEAD:
            continue
        if name is None:
            raise UserError(f"{adapter.name}: tensor {key} has no place in {adapter.base}; {MERGE}")
        if not _same(tensors, name, theirs, key):
            table[name] = key
    ends = (name for name in known.values() if name.endswith("embed_tokens.weight"))
    embedding = next(ends, TABLE)
    made = Overlaid(tensors, Renamed(theirs, table))
    if tied and HEAD in theirs.keys() and not _same(made, embedding, theirs, HEAD):  # noqa: SIM118
        raise UserError(
            f"{adapter.name}: {HEAD} is not {embedding}, but {adapter.base} ties them; {MERGE}"
        )
    if not table:
        return source, ()
    config = dict(source.config)
    if embedding in table:
        config["vocab_size"] = made.info(embedding)[0][0]
    return replace(source, tensors=made, config=config), tuple(sorted(table))


def _same(ours: Tensors, name: str, theirs: Tensors, key: str) -> bool:
    """Return True if two tensors are equal in the precision of the first."""
    if tuple(ours.info(name)[0]) != tuple(theirs.info(key)[0]):
        return False
    own = ours.read(name)
    return np.array_equal(own, theirs.read(key).astype(own.dtype))


def _with_tokenizer(source: Source, folder: Path) -> Source:
    """Return the base with the adapter folder's tokenizer, or else with its chat template alone."""
    own: dict[str, Any] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in TOKENIZER)
    }
    refuse_outside(folder, own.values())
    if TOKENIZER_FILES & own.keys():
        kept = {
            name: content
            for name, content in source.side_files.items()
            if not any(fnmatch(name, pattern) for pattern in TOKENIZER)
        }
        return replace(source, side_files={**kept, **own}, tokenizer=folder)
    own = {name: path for name, path in own.items() if name.startswith("chat_template")}
    return replace(source, side_files={**source.side_files, **own})
