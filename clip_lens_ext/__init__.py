"""CLIP as a first-class model of the TransformerLens and SAELens ecosystem."""

from clip_lens_ext import planted
from clip_lens_ext.attribution import (
    Attribution,
    Faithfulness,
    Site,
    Target,
    activation_energy,
    attribution_patching,
    direction_target,
    exact_ablation,
    faithfulness,
    logit_lens,
    open_site,
    random_attribution,
    text_target,
)
from clip_lens_ext.data import image_batches, read_image
from clip_lens_ext.errors import ClipLensError, HookNameError, InputError, LoadError, UnsupportedModelError
from clip_lens_ext.explain import explain_images
from clip_lens_ext.explanation import Decision, Explanation
from clip_lens_ext.planted import PlantedWorld, planted_clip, planted_sae
from clip_lens_ext.saes import SparseCodes, encode, formats, load_sae, train_sae
from clip_lens_ext.semantics import LatentReferences, References, collect_references
from clip_lens_ext.towers import HookedCLIP, HookedTower, load_clip

__all__ = [
    "Attribution",
    "ClipLensError",
    "Decision",
    "Explanation",
    "Faithfulness",
    "HookNameError",
    "HookedCLIP",
    "HookedTower",
    "InputError",
    "LatentReferences",
    "LoadError",
    "PlantedWorld",
    "References",
    "Site",
    "SparseCodes",
    "Target",
    "UnsupportedModelError",
    "activation_energy",
    "attribution_patching",
    "collect_references",
    "direction_target",
    "encode",
    "exact_ablation",
    "explain_images",
    "faithfulness",
    "formats",
    "image_batches",
    "load_clip",
    "load_sae",
    "logit_lens",
    "open_site",
    "planted",
    "planted_clip",
    "planted_sae",
    "random_attribution",
    "read_image",
    "text_target",
    "train_sae",
]
