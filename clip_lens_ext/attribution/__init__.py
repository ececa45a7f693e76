"""How much each latent matters to a prediction, and whether that can be believed."""

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.accumulate import AttributionAccumulator
from clip_lens_ext.attribution.aggregate import aggregate_attributions
from clip_lens_ext.attribution.baselines import activation_energy, random_attribution
from clip_lens_ext.attribution.compare import compare
from clip_lens_ext.attribution.comparison import Comparison
from clip_lens_ext.attribution.faithfulness import faithfulness
from clip_lens_ext.attribution.faithfulness_result import Faithfulness
from clip_lens_ext.attribution.frozen_norm import frozen_layer_norm
from clip_lens_ext.attribution.gradient_dropping import gradient_dropping
from clip_lens_ext.attribution.heads import HeadComparison, compare_heads
from clip_lens_ext.attribution.integrated import integrated_gradients
from clip_lens_ext.attribution.lens_scores import logit_lens_scores
from clip_lens_ext.attribution.logit_lens import logit_lens
from clip_lens_ext.attribution.methods import METHODS
from clip_lens_ext.attribution.patching import attribution_patching
from clip_lens_ext.attribution.readouts import ScoreTarget, contrast_target, probe_target, softmax_target
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.several import attribution_patching_several
from clip_lens_ext.attribution.site import Site, open_site
from clip_lens_ext.attribution.summary import AttributionSummary
from clip_lens_ext.attribution.targets import Target, direction_target, image_target, text_target

__all__ = [
    "Attribution",
    "AttributionAccumulator",
    "AttributionSummary",
    "Comparison",
    "Faithfulness",
    "HeadComparison",
    "METHODS",
    "ScoreTarget",
    "Site",
    "Target",
    "activation_energy",
    "aggregate_attributions",
    "attribution_patching",
    "attribution_patching_several",
    "compare",
    "compare_heads",
    "contrast_target",
    "direction_target",
    "exact_ablation",
    "faithfulness",
    "frozen_layer_norm",
    "gradient_dropping",
    "image_target",
    "integrated_gradients",
    "logit_lens",
    "logit_lens_scores",
    "open_site",
    "probe_target",
    "random_attribution",
    "softmax_target",
    "text_target",
]
