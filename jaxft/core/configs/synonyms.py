"""Names of keys in TRL, axolotl, diffusers' scripts and kohya, and the keys that do it here.

A name of this table is refused in one line that has the key and the translated value. It is never
accepted, so that a config has one spelling.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_NONE: Mapping[str, str] = {}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit", "paged_adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("lion_8bit", "lion8bit", "paged_lion_8bit"), "lion"),
    "adamw_schedule_free": "schedule_free",
    "adamwschedulefree": "schedule_free",
}
_SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine"}
_PRECISIONS = {"no": "float32", "fp16": "bfloat16", "bf16": "bfloat16", "float": "float32"}
_HALF = {"true": "bfloat16", "false": "float32", "auto": "auto", "": "bfloat16"}
_REMAT = {"true": "full", "false": "none", "": "full", "unsloth": "full", "offload": "offload"}
_STRATEGIES = {"epoch": "1_epochs", "no": "0_steps", "steps": "N_steps"}
_LOSSES = {"sigmoid": "dpo", "simpo": "simpo", "kto_pair": "kto", "apo_zero": "apo_zero"}
_SWITCH = {"true": "True", "false": "False", "": "True", "1": "True", "0": "False"}
_WHOLE_BATCH = "batch_size is that of all devices and all micro_batches together"


class Synonym(NamedTuple):
    """A key here, or "" if there is none, with the form of its value. `note` ends the message.

    values: translations of values. `{}` in the form is the translated value.
    """

    key: str
    form: str = "{}"
    note: str = ""
    values: Mapping[str, str] = _NONE
    translate: Callable[[str], str] | None = None


def _whole(text: str) -> str:
    """Return a count without the decimals of "3.0", or N for what is not a whole number."""
    match = re.fullmatch(r"\s*(\d+)(?:\.0*)?\s*", text)
    return match[1] if match else "N"


def _modules(text: str) -> str:
    """Return a regex over projections for a list of their names."""
    names = re.findall(r"[\w.-]+", text)
    if names in (["all-linear"], []):
        return "all-linear"
    return f".*\\.{names[0]}" if len(names) == 1 else f".*\\.({'|'.join(names)})"


def _prompts(text: str) -> str:
    return f"[{text!r}]"


def _one_less(text: str) -> str:
    """Return kohya's number of CLIP's layer, which is 1 for the last one, as one that is 0."""
    whole = _whole(text)
    return whole if whole == "N" else str(max(0, int(whole) - 1))


def _chunks(text: str) -> str:
    """Return the number of chunks of 75 tokens in kohya's length of a caption."""
    whole = _whole(text)
    return whole if whole == "N" else str(max(1, int(whole) // 75))


_EPOCHS = Synonym("total", "{}_epochs", translate=_whole)
_STEPS = Synonym("total", "{}_steps", translate=_whole)
_ONE_DEVICE = Synonym("batch_size", note=_WHOLE_BATCH)
_FOLDER = Synonym("data.train", "folder:{}")
_LENGTH = Synonym("seq_len")
_RESUME = Synonym("--workdir", note="the same command resumes a run, and so does --workdir alone")
_CHOSEN = Synonym("", note="the kernel is chosen by the device")

# By trainer, as docs/coming-from.md shows them. A name of several stands where it is most common.
TRL_NAMES = {
    "model_name_or_path": Synonym("model"),
    "dataset_name": Synonym("data.train", "hf:{}"),
    "learning_rate": Synonym("optim.lr"),
    "num_train_epochs": _EPOCHS,
    "max_steps": _STEPS,
    "per_device_train_batch_size": _ONE_DEVICE,
    "per_device_eval_batch_size": Synonym("", note="an evaluation follows batch_size"),
    "gradient_accumulation_steps": Synonym("micro_batches", note=_WHOLE_BATCH),
    "max_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "packing": Synonym("pack", values=_SWITCH),
    "completion_only_loss": Synonym("", note="records of prompt and completion train so"),
    "assistant_only_loss": Synonym("", note="records of messages train so"),
    "chat_template_path": Synonym("chat"),
    "use_peft": Synonym("lora.rank", "8"),
    "lora_r": Synonym("lora.rank"),
    "lora_alpha": Synonym("lora.alpha"),
    "lora_dropout": Synonym("lora.dropout"),
    "lora_target_modules": Synonym("lora.targets", translate=_modules),
    "target_modules": Synonym("lora.targets", translate=_modules),
    "lora_modules_to_save": Synonym("trainable", "REGEX", "it is a regex over parameter paths"),
    "use_rslora": Synonym("lora.rslora", values=_SWITCH),
    "use_dora": Synonym("lora.dora", values=_SWITCH),
    "rank_pattern": Synonym("lora.ranks", "REGEX=RANK"),
    "layers_to_transform": Synonym("lora.layers"),
    "load_in_4bit": Synonym("base", "nf4", "a LoRA trains on it"),
    "load_in_8bit": Synonym("base", "int8", "a LoRA trains on it"),
    "lr_scheduler_type": Synonym("optim.schedule", values=_SCHEDULES),
    "warmup_steps": Synonym("optim.warmup", "{}_steps", translate=_whole),
    "warmup_ratio": Synonym("optim.warmup", "N_steps", "N is that share of the steps of total"),
    "optim": Synonym("optim.name", values=_OPTIMIZERS),
    "adam_beta1": Synonym("optim.b1"),
    "adam_beta2": Synonym("optim.b2"),
    "max_grad_norm": Synonym("optim.clip"),
    "bf16": Synonym("compute_dtype", values=_HALF),
    "fp16": Synonym("compute_dtype", note="float16 is not used", values=_HALF),
    "tf32": Synonym("compute_dtype", values={"true": "bfloat16", "false": "float32"}),
    "torch_dtype": Synonym("param_dtype", values=_PRECISIONS),
    "gradient_checkpointing": Synonym("remat", values=_REMAT),
    "attn_implementation": _CHOSEN,
    "logging_steps": Synonym("every.log", "{}_steps", translate=_whole),
    "eval_strategy": Synonym("every.eval", values=_STRATEGIES),
    "evaluation_strategy": Synonym("every.eval", values=_STRATEGIES),
    "eval_steps": Synonym("every.eval", "{}_steps", translate=_whole),
    "save_strategy": Synonym("every.save", values=_STRATEGIES),
    "save_steps": Synonym("every.save", "{}_steps", translate=_whole),
    "save_total_limit": Synonym("", note="the three newest checkpoints are kept"),
    "load_best_model_at_end": Synonym("keep.best", "loss"),
    "metric_for_best_model": Synonym("keep.best"),
    "early_stopping_patience": Synonym("stop.patience"),
    "report_to": Synonym("track"),
    "push_to_hub": Synonym("export.push", "ME/MODEL"),
    "hub_model_id": Synonym("export.push"),
    "output_dir": Synonym("--workdir"),
    "resume_from_checkpoint": _RESUME,
    "data_seed": Synonym("seed"),
    "dataloader_num_workers": Synonym("", note="rows are read beside the step"),
    "beta": Synonym("preference.beta"),
    "loss_type": Synonym("objective", values=_LOSSES),
    "label_smoothing": Synonym("preference.smoothing"),
    "simpo_gamma": Synonym("preference.margin", note="it is gamma / beta"),
    "teacher_model_name_or_path": Synonym("distill.teacher"),
    "num_labels": Synonym("labels", "NAME,NAME", "it lists the names of the classes"),
    "fsdp": Synonym("mesh.fsdp", "-1"),
    "deepspeed": Synonym("mesh.fsdp", "-1", "parameters are shared as in ZeRO 3"),
}
AXOLOTL_NAMES = {
    "base_model": Synonym("model"),
    "datasets": Synonym("data.train", "PATH", "a mixture is 0.7*a.jsonl + 0.3*b.jsonl"),
    "test_datasets": Synonym("data.eval", "PATH"),
    "val_set_size": Synonym("data.eval", "PATH", "hold records out in a file of their own"),
    "lr": Synonym("optim.lr"),
    "num_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "micro_batch_size": _ONE_DEVICE,
    "sequence_len": _LENGTH,
    "sample_packing": Synonym("pack", values=_SWITCH),
    "chat_template": Synonym("chat"),
    "adapter": Synonym("lora.rank", "8"),
    "lora_model_dir": Synonym("lora.from"),
    "lora_target_linear": Synonym("lora.targets", "all-linear"),
    "peft_use_dora": Synonym("lora.dora", values=_SWITCH),
    "peft_use_rslora": Synonym("lora.rslora", values=_SWITCH),
    "unfrozen_parameters": Synonym("trainable", "REGEX"),
    "optimizer": Synonym("optim.name", values=_OPTIMIZERS),
    "lr_scheduler": Synonym("optim.schedule", values=_SCHEDULES),
    "flash_attention": _CHOSEN,
    "sdp_attention": _CHOSEN,
    "evals_per_epoch": Synonym("every.eval", "N_steps"),
    "saves_per_epoch": Synonym("every.save", "N_steps"),
    "train_on_inputs": Synonym("", note="records of text train whole, prompts do not train"),
    "dataset_prepared_path": Synonym("cache"),
    "wandb_project": Synonym("track", "wandb:{}"),
    "mlflow_experiment_name": Synonym("track", "mlflow:{}"),
    "rl": Synonym("objective"),
}
DIFFUSERS_NAMES = {
    "pretrained_model_name_or_path": Synonym("model"),
    "train_data_dir": _FOLDER,
    "instance_data_dir": _FOLDER,
    "class_data_dir": Synonym("prior.data", "folder:{}"),
    "instance_prompt": Synonym("", note="captions are those of the pictures: a .txt beside each"),
    "class_prompt": Synonym("", note="captions are those of the pictures: a .txt beside each"),
    "with_prior_preservation": Synonym("prior.data", "folder:PATH"),
    "prior_loss_weight": Synonym("prior.weight"),
    "train_batch_size": _ONE_DEVICE,
    "max_train_steps": _STEPS,
    "checkpointing_steps": Synonym("every.save", "{}_steps", translate=_whole),
    "validation_steps": Synonym("every.sample", "{}_steps", translate=_whole),
    "validation_epochs": Synonym("every.sample", "{}_epochs", translate=_whole),
    "validation_prompt": Synonym("sample.prompts", translate=_prompts),
    "validation_prompts": Synonym("sample.prompts", translate=_prompts),
    "num_inference_steps": Synonym("sample.steps"),
    "guidance_scale": Synonym("sample.guidance"),
    "rank": Synonym("lora.rank"),
    "lr_warmup_steps": Synonym("optim.warmup", "{}_steps", translate=_whole),
    "scale_lr": Synonym("", note="optim.lr is used as it stands"),
    "use_8bit_adam": Synonym("optim.name", "adamw_8bit"),
    "adam_weight_decay": Synonym("optim.weight_decay"),
    "use_ema": Synonym("optim.ema", "0.9999"),
    "ema_decay": Synonym("optim.ema"),
    "mixed_precision": Synonym("compute_dtype", values=_PRECISIONS),
    "snr_gamma": Synonym("min_snr_gamma"),
    "proportion_empty_prompts": Synonym("caption_dropout"),
    "conditioning_dropout_prob": Synonym("caption_dropout"),
    "random_flip": Synonym("flip", values=_SWITCH),
    "center_crop": Synonym("buckets", "False"),
    "prediction_type": Synonym("prediction"),
    "train_text_encoder": Synonym(
        "trainable", r"'(?!vae\.).*'", "it is a regex over parameter paths: all but the VAE"
    ),
    "placeholder_token": Synonym("inversion.token"),
    "initializer_token": Synonym("inversion.init"),
    "num_vectors": Synonym("inversion.vectors"),
    "enable_xformers_memory_efficient_attention": _CHOSEN,
    "variant": Synonym("", note="the variant is found in the folder"),
}
KOHYA_NAMES = {
    "max_token_length": Synonym("caption_chunks", note="a chunk has 75 tokens", translate=_chunks),
    "network_dim": Synonym("lora.rank"),
    "network_alpha": Synonym("lora.alpha"),
    "network_dropout": Synonym("lora.dropout"),
    "network_weights": Synonym("lora.from"),
    "network_module": Synonym("lora.rank", "8"),
    "dim_from_weights": Synonym("lora.from", "FILE"),
    "unet_lr": Synonym("optim.lr"),
    "text_encoder_lr": Synonym("optim.lr_by", "text_encoder.*=FACTOR", "a factor of optim.lr"),
    "max_train_epochs": _EPOCHS,
    "optimizer_type": Synonym("optim.name", values=_OPTIMIZERS),
    "enable_bucket": Synonym("buckets", values=_SWITCH),
    "caption_dropout_rate": Synonym("caption_dropout"),
    "flip_aug": Synonym("flip", values=_SWITCH),
    "clip_skip": Synonym("clip_skip", note="it is kohya's number less 1", translate=_one_less),
    "v_parameterization": Synonym("prediction", "v_prediction"),
    "zero_terminal_snr": Synonym("zero_snr", values=_SWITCH),
    "cache_latents": Synonym("cache", "runs/cache"),
    "cache_latents_to_disk": Synonym("cache", "runs/cache"),
    "save_every_n_steps": Synonym("every.save", "{}_steps", translate=_whole),
    "save_every_n_epochs": Synonym("every.save", "{}_epochs", translate=_whole),
    "sample_every_n_steps": Synonym("every.sample", "{}_steps", translate=_whole),
    "sample_every_n_epochs": Synonym("every.sample", "{}_epochs", translate=_whole),
    "sample_prompts": Synonym("sample.prompts", translate=_prompts),
    "save_precision": Synonym("export.dtype", values={**_PRECISIONS, "fp16": "float16"}),
    "save_model_as": Synonym("export.kind", "lora"),
    "output_name": Synonym("--workdir", note="a LoRA file has the name of its run folder"),
    "reg_data_dir": Synonym("prior.data", "folder:{}"),
    "xformers": _CHOSEN,
    "sdpa": _CHOSEN,
}
SYNONYMS: Mapping[str, Synonym] = {**KOHYA_NAMES, **DIFFUSERS_NAMES, **AXOLOTL_NAMES, **TRL_NAMES}


def advice(name: str, value: str | None = None) -> str:
    """Return what to write here for another trainer's `name=value`, or "" for an unknown name.

    The last part of a dotted name counts too.
    """
    plain = name.replace("-", "_").lower()
    section, _, leaf = plain.rpartition(".")
    found = SYNONYMS.get(plain) or SYNONYMS.get(leaf)
    if found is None or (section and found.key.endswith(f".{leaf}")):  # a mistyped section
        return ""
    if not found.key:
        return f"{name} has no key here: {found.note}"
    shown = found.form.format(_translated(found, value))
    option = found.key if found.key.startswith("--") else f"--config.{found.key}"
    end = f" ({found.note})" if found.note else ""
    return f"{name} is {found.key} here: give {option}={quoted(shown)}{end}"


def _translated(found: Synonym, value: str | None) -> str:
    if not value:
        return found.values.get("", "VALUE")
    if found.translate is not None:
        return found.translate(value)
    return found.values.get(value.lower(), value)


def quoted(text: str) -> str:
    """Return a text as a shell reads it back."""
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else f'"{text}"'
