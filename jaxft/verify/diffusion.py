"""Pipelines against diffusers: each network, and pictures from the same noise."""

from math import lcm
from typing import Any

import jax
import numpy as np

from jaxft.models.pipelines import families
from jaxft.models.pipelines.families import AnyConfig
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import PipelineConfig
from jaxft.tasks.diffusion.captions import load_captions
from jaxft.verify.autoencoder import vae_subject
from jaxft.verify.component import check
from jaxft.verify.pipelines.denoisers import FLOW_SUBJECTS, unet_subject
from jaxft.verify.pipelines.pictures import (
    CAPTIONS,
    PIPELINE_GUIDANCE,
    STEPS,
    PipelineSubject,
    trajectory,
)
from jaxft.verify.pipelines.text_encoders import text_subjects
from jaxft.verify.report import Check, certificate, start

ORACLES = ("torch", "diffusers", "transformers")
SIDE = 32  # most latents of a picture's long side


def certify(spec: str) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of a pipeline's folder or single file, both sides in fp32.

    Each network is compared alone, with one side in memory at a time. Then all networks together
    sample pictures.
    """
    start(ORACLES)
    opened = open_pipeline(spec)
    checks, about = [], {}
    with jax.default_matmul_precision("highest"):
        for subject in opened.subjects:
            found = check(subject)
            checks += found.checks
            about[subject.name] = found.about
        if opened.cfg.in_channels == opened.cfg.vae.latent_channels:
            checks.append(trajectory(opened))
    height, width = (side * opened.cfg.vae.factor for side in opened.size)
    more = {
        "components": about,
        "trajectory": {
            "sampler": opened.sampler,
            "steps": STEPS,
            "guidance": PIPELINE_GUIDANCE,
            "pixels": [height, width],
        },
    }
    return certificate(spec, checks, ORACLES, more), checks


def open_pipeline(spec: str) -> PipelineSubject:
    """Open a pipeline. Every tensor is accounted for before one is read."""
    pipeline = open_model(spec)
    cfg = families.read_config(pipeline)
    denoiser, autoencoder, *texts = families.parts(pipeline, cfg)
    captions, size = load_captions(pipeline, cfg.texts), _size(cfg)
    ids = np.stack([captions(one) for one in (*CAPTIONS, "")])
    subjects = text_subjects(pipeline, texts, cfg.texts, ids)
    subjects.append(vae_subject(pipeline.components["vae"], autoencoder, cfg.vae))
    if isinstance(cfg, PipelineConfig):
        subjects.append(unet_subject(pipeline, denoiser, cfg, size))
    else:
        subjects.append(FLOW_SUBJECTS[cfg.family](pipeline, denoiser, cfg, size))
    for subject in subjects:
        subject.part.entries(subject.leaves)
    return PipelineSubject(pipeline, cfg, subjects, ids, size)


def _size(cfg: AnyConfig) -> tuple[int, int]:
    """Return the latents' (Y, X), with Y twice X.

    jaxft's denoisers and diffusers' pipelines accept this size.
    """
    stated: Any = cfg.sample_size or SIDE
    side = min(*stated, SIDE) if isinstance(stated, list | tuple) else min(stated, SIDE)
    unit = lcm(8, cfg.multiple) // cfg.vae.factor
    short = max(side // 2 // unit, 1) * unit
    return 2 * short, short
