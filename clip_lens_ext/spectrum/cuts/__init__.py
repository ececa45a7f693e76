"""Where a spectrum is cut into signal and noise; one rule a file."""

from clip_lens_ext.spectrum.cuts.cut import Cut, Cutoff
from clip_lens_ext.spectrum.cuts.fixed import Fixed
from clip_lens_ext.spectrum.cuts.gap import Gap
from clip_lens_ext.spectrum.cuts.gavish_donoho import GavishDonoho
from clip_lens_ext.spectrum.cuts.knee import Knee
from clip_lens_ext.spectrum.cuts.marchenko_pastur import MarchenkoPastur
from clip_lens_ext.spectrum.cuts.permutation import Permutation
from clip_lens_ext.spectrum.cuts.registry import CUTS, find_cut
from clip_lens_ext.spectrum.cuts.variance_share import VarianceShare

__all__ = [
    "CUTS",
    "Cut",
    "Cutoff",
    "Fixed",
    "Gap",
    "GavishDonoho",
    "Knee",
    "MarchenkoPastur",
    "Permutation",
    "VarianceShare",
    "find_cut",
]
