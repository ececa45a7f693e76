"""How much each latent matters to a prediction, and whether that can be believed."""

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.baselines import activation_energy, random_attribution
from clip_lens_ext.attribution.faithfulness import faithfulness
from clip_lens_ext.attribution.faithfulness_result import Faithfulness
from clip_lens_ext.attribution.logit_lens import logit_lens
from clip_lens_ext.attribution.patching import attribution_patching
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.site import Site, open_site
from clip_lens_ext.attribution.targets import Target, direction_target, text_target

__all__ = [
    "Attribution",
    "Faithfulness",
    "Site",
    "Target",
    "activation_energy",
    "attribution_patching",
    "direction_target",
    "exact_ablation",
    "faithfulness",
    "logit_lens",
    "open_site",
    "random_attribution",
    "text_target",
]
