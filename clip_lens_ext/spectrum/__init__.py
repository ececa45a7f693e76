"""Signal and noise: covariances of activations, the directions that are noise, and pruning them."""

from clip_lens_ext.spectrum.collect import Covariances, collect_covariance
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.spectrum.cuts import CUTS
from clip_lens_ext.spectrum.folding import fold_pruning
from clip_lens_ext.spectrum.invariance import SubgroupSplits, split_subgroups, subgroup_overlap
from clip_lens_ext.spectrum.invariance_result import SubgroupOverlap
from clip_lens_ext.spectrum.noise import split_noise
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.pairs import PairCovariance, StreamingPairCovariance
from clip_lens_ext.spectrum.pruning import prune
from clip_lens_ext.spectrum.rules import RULES
from clip_lens_ext.spectrum.subspaces import principal_angles

__all__ = [
    "CUTS",
    "RULES",
    "Covariance",
    "Covariances",
    "NoiseSplit",
    "PairCovariance",
    "StreamingCovariance",
    "StreamingPairCovariance",
    "SubgroupOverlap",
    "SubgroupSplits",
    "collect_covariance",
    "fold_pruning",
    "principal_angles",
    "prune",
    "split_noise",
    "split_subgroups",
    "subgroup_overlap",
]
