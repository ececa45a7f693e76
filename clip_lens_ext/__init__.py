"""CLIP as a first-class model of the TransformerLens and SAELens ecosystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# fmt: off
# isort: off
if TYPE_CHECKING:
    from clip_lens_ext import planted
    from clip_lens_ext.attribution import (
        METHODS, Attribution, AttributionAccumulator, AttributionSummary, Comparison, Faithfulness, HeadComparison,
        ScoreTarget, Site, Target, activation_energy, aggregate_attributions, attribution_patching,
        attribution_patching_several, compare, compare_heads, contrast_target, direction_target, exact_ablation,
        faithfulness, frozen_layer_norm, gradient_dropping, image_target, integrated_gradients, logit_lens,
        logit_lens_scores, open_site, probe_target, random_attribution, softmax_target, text_target,
    )
    from clip_lens_ext.data import image_batches, read_image
    from clip_lens_ext.errors import ClipLensError, HookNameError, InputError, LoadError, UnsupportedModelError
    from clip_lens_ext.explain import explain_images
    from clip_lens_ext.explanation import Decision, Explanation
    from clip_lens_ext.noise_attribution import noise_share
    from clip_lens_ext.noise_attribution_result import NoiseShare
    from clip_lens_ext.noise_latents import NoiseAlignment, noise_alignment
    from clip_lens_ext.passes import Accumulator, PassReport, run_pass
    from clip_lens_ext.planted import (
        PlantedWorld, planted_clip, planted_sae, planted_sparse_clip,
    )
    from clip_lens_ext.saes import SAECheck, SparseCodes, check_sae, encode, formats, load_sae, train_sae, train_saes
    from clip_lens_ext.semantics import (
        Alignment, DecoderProjection, EmptyPrompt, Evidence, Flag, Flags, Intervention, InterventionEffects, Label,
        LabelUniqueness, LatentActivity, LatentReferences, LatentScores, PictureSenses, ReferenceCrops,
        ReferenceEmbeddings, References, Sense, SoftWPMI, StreamingClarity, StreamingMonosemanticity, SwitchedOff,
        TermEmbeddings, Vocabulary, WordNet, WordSenses, align, clarity, collect_references, crop_pictures,
        crop_references, draw_word, embed_references, find_picture_senses, find_word_senses, flag_components,
        label_uniqueness, mask_boxes, measure_interventions, monosemanticity, polysemanticity, read_wordnet,
        redundancy, switch_off,
    )
    from clip_lens_ext.sparse_clip import (
        BesideDense, Captions, CaptionSteering, CaptionTokenizer, CaptionTraining, CodeBatch, CodeMeasures, Concept,
        ConceptDrift, ConceptFeatures, ConceptNames, Decomposition, DriftEvent, EmbeddedPairs, SparseCaptioner,
        SparseHead, SparseTraining, SteeringData, SteeringEffect, StreamingCodeMeasures, add_sparse_heads,
        additive_attribution, beside_dense, caption_steering, code_measures, concept_drift, decompose, dense_clip,
        embed_pairs, feature_ablation, features_of, load_sparse_clip, modality_score, name_concepts, save_sparse_clip,
        sparse_captioner, steer, steered, steering_effect, train_captioner, train_sparse_clip,
    )
    from clip_lens_ext.spectrum import (
        CUTS, RULES, Covariance, Covariances, EvaluationData, NoiseSplit, PairCovariance, PruningEvaluation,
        SpectrumAnalysis, StreamingCovariance, StreamingPairCovariance, SubgroupOverlap, SubgroupSplits,
        analyse_spectrum, collect_covariance, evaluate_pruning, fold_pruning, principal_angles, prune,
        shuffled_pixels, shuffled_words, split_noise, split_subgroups, subgroup_overlap,
    )
    from clip_lens_ext.towers import HookedCLIP, HookedTower, load_clip, register_family
# isort: on
# fmt: on

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
    "noise_attribution": ("noise_share",),
    "noise_attribution_result": ("NoiseShare",),
    "noise_latents": ("NoiseAlignment", "noise_alignment"),
    "passes": ("Accumulator", "PassReport", "run_pass"),
    "planted": (
        "PlantedWorld", "planted_clip", "planted_sae", "planted_sparse_clip",
    ),
    "saes": ("SAECheck", "SparseCodes", "check_sae", "encode", "formats", "load_sae", "train_sae", "train_saes"),
    "semantics": (
        "Alignment", "DecoderProjection", "EmptyPrompt", "Evidence", "Flag", "Flags", "Intervention",
        "InterventionEffects", "Label", "LabelUniqueness", "LatentActivity", "LatentReferences", "LatentScores",
        "PictureSenses", "ReferenceCrops", "ReferenceEmbeddings", "References", "Sense", "SoftWPMI",
        "StreamingClarity", "StreamingMonosemanticity", "SwitchedOff", "TermEmbeddings", "Vocabulary",
        "WordNet", "WordSenses", "align", "clarity", "collect_references", "crop_pictures", "crop_references",
        "draw_word", "embed_references", "find_picture_senses", "find_word_senses", "flag_components",
        "label_uniqueness", "mask_boxes", "measure_interventions", "monosemanticity", "polysemanticity",
        "read_wordnet", "redundancy", "switch_off",
    ),
    "sparse_clip": (
        "BesideDense", "CaptionSteering", "CaptionTokenizer", "CaptionTraining", "Captions", "CodeBatch",
        "CodeMeasures", "Concept", "ConceptDrift", "ConceptFeatures", "ConceptNames", "Decomposition", "DriftEvent",
        "EmbeddedPairs", "SparseCaptioner", "SparseHead", "SparseTraining", "SteeringData", "SteeringEffect",
        "StreamingCodeMeasures", "add_sparse_heads", "additive_attribution", "beside_dense", "caption_steering",
        "code_measures", "concept_drift", "decompose", "dense_clip", "embed_pairs", "feature_ablation", "features_of",
        "load_sparse_clip", "modality_score", "name_concepts", "save_sparse_clip", "sparse_captioner", "steer",
        "steered", "steering_effect", "train_captioner", "train_sparse_clip",
    ),
    "spectrum": (
        "CUTS", "RULES", "Covariance", "Covariances", "EvaluationData", "NoiseSplit", "PairCovariance",
        "PruningEvaluation", "SpectrumAnalysis", "StreamingCovariance", "StreamingPairCovariance", "SubgroupOverlap",
        "SubgroupSplits", "analyse_spectrum", "collect_covariance", "evaluate_pruning", "fold_pruning",
        "principal_angles", "prune", "shuffled_pixels", "shuffled_words", "split_noise", "split_subgroups",
        "subgroup_overlap",
    ),
    "towers": ("HookedCLIP", "HookedTower", "load_clip", "register_family"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CUTS", "METHODS", "RULES", "Accumulator", "Alignment", "Attribution", "AttributionAccumulator",
    "AttributionSummary", "BesideDense", "CaptionSteering", "CaptionTokenizer", "CaptionTraining", "Captions",
    "ClipLensError", "CodeBatch", "CodeMeasures", "Comparison", "Concept", "ConceptDrift", "ConceptFeatures",
    "ConceptNames", "Covariance", "Covariances", "Decision", "DecoderProjection", "Decomposition", "DriftEvent",
    "EmbeddedPairs", "EmptyPrompt", "EvaluationData", "Evidence", "Explanation", "Faithfulness", "Flag", "Flags",
    "HeadComparison", "HookNameError", "HookedCLIP", "HookedTower", "InputError", "Intervention",
    "InterventionEffects", "Label", "LabelUniqueness", "LatentActivity", "LatentReferences", "LatentScores",
    "LoadError", "NoiseAlignment", "NoiseShare", "NoiseSplit", "PairCovariance", "PassReport", "PictureSenses",
    "PlantedWorld", "PruningEvaluation", "ReferenceCrops", "ReferenceEmbeddings", "References", "SAECheck",
    "ScoreTarget", "Sense", "Site", "SoftWPMI", "SparseCaptioner", "SparseCodes", "SparseHead", "SparseTraining",
    "SpectrumAnalysis", "SteeringData", "SteeringEffect", "StreamingClarity", "StreamingCodeMeasures",
    "StreamingCovariance", "StreamingMonosemanticity", "StreamingPairCovariance", "SubgroupOverlap", "SubgroupSplits",
    "SwitchedOff", "Target", "TermEmbeddings", "UnsupportedModelError", "Vocabulary", "WordNet", "WordSenses",
    "activation_energy", "add_sparse_heads", "additive_attribution", "aggregate_attributions", "align",
    "analyse_spectrum", "attribution_patching", "attribution_patching_several", "beside_dense", "caption_steering",
    "check_sae", "clarity", "code_measures", "collect_covariance", "collect_references", "compare", "compare_heads",
    "concept_drift", "contrast_target", "crop_pictures", "crop_references", "decompose", "dense_clip",
    "direction_target", "draw_word", "embed_pairs", "embed_references", "encode", "evaluate_pruning",
    "exact_ablation", "explain_images", "faithfulness", "feature_ablation", "features_of", "find_picture_senses",
    "find_word_senses", "flag_components", "fold_pruning", "formats", "frozen_layer_norm", "gradient_dropping",
    "image_batches", "image_target", "integrated_gradients", "label_uniqueness", "load_clip", "load_sae",
    "load_sparse_clip", "logit_lens", "logit_lens_scores", "mask_boxes", "measure_interventions", "modality_score",
    "monosemanticity", "name_concepts", "noise_alignment", "noise_share", "open_site", "planted", "planted_clip",
    "planted_sae", "planted_sparse_clip", "polysemanticity", "principal_angles", "probe_target", "prune",
    "random_attribution", "read_image", "read_wordnet", "redundancy", "register_family", "run_pass",
    "save_sparse_clip", "shuffled_pixels", "shuffled_words", "softmax_target", "sparse_captioner", "split_noise",
    "split_subgroups", "steer", "steered", "steering_effect", "subgroup_overlap", "switch_off", "text_target",
    "train_captioner", "train_sae", "train_saes", "train_sparse_clip",
]  # fmt: skip


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
