"""CLIP as a first-class model of the TransformerLens and SAELens ecosystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_lens_ext import planted
    from clip_lens_ext.attribution import (
        METHODS,
        Attribution,
        AttributionAccumulator,
        AttributionSummary,
        Comparison,
        Faithfulness,
        HeadComparison,
        ScoreTarget,
        Site,
        Target,
        activation_energy,
        aggregate_attributions,
        attribution_patching,
        attribution_patching_several,
        compare,
        compare_heads,
        contrast_target,
        direction_target,
        exact_ablation,
        faithfulness,
        frozen_layer_norm,
        gradient_dropping,
        image_target,
        integrated_gradients,
        logit_lens,
        logit_lens_scores,
        open_site,
        probe_target,
        random_attribution,
        softmax_target,
        text_target,
    )
    from clip_lens_ext.data import image_batches, read_image
    from clip_lens_ext.errors import ClipLensError, HookNameError, InputError, LoadError, UnsupportedModelError
    from clip_lens_ext.explain import explain_images
    from clip_lens_ext.explanation import Decision, Explanation
    from clip_lens_ext.passes import Accumulator, PassReport, run_pass
    from clip_lens_ext.planted import PlantedWorld, planted_clip, planted_sae
    from clip_lens_ext.saes import SAECheck, SparseCodes, check_sae, encode, formats, load_sae, train_sae, train_saes
    from clip_lens_ext.semantics import (
        Alignment,
        DecoderProjection,
        EmptyPrompt,
        Label,
        LabelUniqueness,
        LatentActivity,
        LatentReferences,
        LatentScores,
        ReferenceCrops,
        ReferenceEmbeddings,
        References,
        Sense,
        SoftWPMI,
        StreamingClarity,
        StreamingMonosemanticity,
        TermEmbeddings,
        Vocabulary,
        WordNet,
        align,
        clarity,
        collect_references,
        crop_references,
        embed_references,
        label_uniqueness,
        monosemanticity,
        polysemanticity,
        read_wordnet,
        redundancy,
    )
    from clip_lens_ext.towers import HookedCLIP, HookedTower, load_clip, register_family

# Looked up when they are first used: the towers work without sae_lens, and a script pays for what it uses.
_HOMES = {
    "attribution": (
        "METHODS", "Attribution", "AttributionAccumulator", "AttributionSummary", "Comparison", "Faithfulness",
        "HeadComparison", "ScoreTarget", "Site", "Target", "activation_energy", "aggregate_attributions",
        "attribution_patching", "attribution_patching_several", "compare", "compare_heads", "contrast_target",
        "direction_target", "exact_ablation", "faithfulness", "frozen_layer_norm", "gradient_dropping",
        "image_target", "integrated_gradients", "logit_lens", "logit_lens_scores", "open_site", "probe_target",
        "random_attribution", "softmax_target", "text_target",
    ),
    "data": ("image_batches", "read_image"),
    "errors": ("ClipLensError", "HookNameError", "InputError", "LoadError", "UnsupportedModelError"),
    "explain": ("explain_images",),
    "explanation": ("Decision", "Explanation"),
    "passes": ("Accumulator", "PassReport", "run_pass"),
    "planted": ("PlantedWorld", "planted_clip", "planted_sae"),
    "saes": ("SAECheck", "SparseCodes", "check_sae", "encode", "formats", "load_sae", "train_sae", "train_saes"),
    "semantics": (
        "Alignment", "DecoderProjection", "EmptyPrompt", "Label", "LabelUniqueness", "LatentActivity",
        "LatentReferences", "LatentScores", "ReferenceCrops", "ReferenceEmbeddings", "References", "Sense",
        "SoftWPMI", "StreamingClarity", "StreamingMonosemanticity", "TermEmbeddings", "Vocabulary", "WordNet",
        "align", "clarity", "collect_references", "crop_references", "embed_references", "label_uniqueness",
        "monosemanticity", "polysemanticity", "read_wordnet", "redundancy",
    ),
    "towers": ("HookedCLIP", "HookedTower", "load_clip", "register_family"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "Accumulator",
    "Alignment",
    "Attribution",
    "AttributionAccumulator",
    "AttributionSummary",
    "ClipLensError",
    "Comparison",
    "Decision",
    "DecoderProjection",
    "EmptyPrompt",
    "Explanation",
    "Faithfulness",
    "HeadComparison",
    "HookNameError",
    "HookedCLIP",
    "HookedTower",
    "InputError",
    "Label",
    "LabelUniqueness",
    "LatentActivity",
    "LatentReferences",
    "LatentScores",
    "LoadError",
    "PassReport",
    "PlantedWorld",
    "ReferenceCrops",
    "ReferenceEmbeddings",
    "References",
    "SAECheck",
    "ScoreTarget",
    "Sense",
    "Site",
    "SoftWPMI",
    "SparseCodes",
    "StreamingClarity",
    "StreamingMonosemanticity",
    "Target",
    "TermEmbeddings",
    "UnsupportedModelError",
    "Vocabulary",
    "WordNet",
    "activation_energy",
    "aggregate_attributions",
    "align",
    "attribution_patching",
    "attribution_patching_several",
    "check_sae",
    "clarity",
    "collect_references",
    "compare",
    "compare_heads",
    "contrast_target",
    "crop_references",
    "direction_target",
    "embed_references",
    "encode",
    "exact_ablation",
    "explain_images",
    "faithfulness",
    "formats",
    "frozen_layer_norm",
    "gradient_dropping",
    "image_batches",
    "image_target",
    "integrated_gradients",
    "label_uniqueness",
    "load_clip",
    "load_sae",
    "logit_lens",
    "logit_lens_scores",
    "monosemanticity",
    "open_site",
    "planted",
    "planted_clip",
    "planted_sae",
    "polysemanticity",
    "probe_target",
    "random_attribution",
    "read_image",
    "read_wordnet",
    "redundancy",
    "register_family",
    "run_pass",
    "softmax_target",
    "text_target",
    "train_sae",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name == "planted":
        return import_module("clip_lens_ext.planted")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'clip_lens_ext' has no attribute {name!r}")
    value = getattr(import_module(f"clip_lens_ext.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
