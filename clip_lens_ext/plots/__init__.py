"""Pictures and tables of results; they take results, never models."""

from clip_lens_ext.plots.comparison import plot_comparison
from clip_lens_ext.plots.concepts import plot_concepts
from clip_lens_ext.plots.drift import plot_drift
from clip_lens_ext.plots.explanation import plot_explanation
from clip_lens_ext.plots.flags import plot_flag
from clip_lens_ext.plots.spectrum import plot_overlap, plot_pruning, plot_spectrum
from clip_lens_ext.plots.table import explanation_legend, explanation_table

__all__ = [
    "explanation_legend",
    "explanation_table",
    "plot_comparison",
    "plot_concepts",
    "plot_drift",
    "plot_explanation",
    "plot_flag",
    "plot_overlap",
    "plot_pruning",
    "plot_spectrum",
]
