"""Signal and noise: covariances of activations, the directions that are noise, and pruning them."""

from clip_lens_ext.spectrum.analysis import SpectrumAnalysis, analyse_spectrum
from clip_lens_ext.spectrum.collect import Covariances, collect_covariance
from clip_lens_ext.spectrum.covariance import StreamingCovariance
from clip_lens_ext.spectrum.covariance_result import Covariance
from clip_lens_ext.spectrum.cuts import CUTS
from clip_lens_ext.spectrum.evaluation import evaluate_pruning
from clip_lens_ext.spectrum.evaluation_data import EvaluationData
from clip_lens_ext.spectrum.evaluation_result import PruningEvaluation
from clip_lens_ext.spectrum.folding import fold_pruning
from clip_lens_ext.spectrum.invariance import SubgroupSplits, split_subgroups, subgroup_overlap
from clip_lens_ext.spectrum.invariance_result import SubgroupOverlap
from clip_lens_ext.spectrum.noise import split_noise
from clip_lens_ext.spectrum.noise_split import NoiseSplit
from clip_lens_ext.spectrum.nonsemantic import shuffled_pixels, shuffled_words
from clip_lens_ext.spectrum.pairs import PairCovariance, StreamingPairCovariance
from clip_lens_ext.spectrum.pruning import prune
from clip_lens_ext.spectrum.rules import RULES
from clip_lens_ext.spectrum.subspaces import principal_angles

__all__ = [
    "CUTS",
    "RULES",
    "Covariance",
    "Covariances",
    "EvaluationData",
    "NoiseSplit",
    "PairCovariance",
    "PruningEvaluation",
    "SpectrumAnalysis",
    "StreamingCovariance",
    "StreamingPairCovariance",
    "SubgroupOverlap",
    "SubgroupSplits",
    "analyse_spectrum",
    "collect_covariance",
    "evaluate_pruning",
    "fold_pruning",
    "principal_angles",
    "prune",
    "shuffled_pixels",
    "shuffled_words",
    "split_noise",
    "split_subgroups",
    "subgroup_overlap",
]
