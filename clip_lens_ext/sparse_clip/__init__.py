"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.code_measures import CodeBatch, StreamingCodeMeasures, code_measures
from clip_lens_ext.sparse_clip.code_measures_result import CodeMeasures
from clip_lens_ext.sparse_clip.concept_names import Concept, ConceptNames
from clip_lens_ext.sparse_clip.drift import concept_drift
from clip_lens_ext.sparse_clip.drift_result import ConceptDrift, DriftEvent
from clip_lens_ext.sparse_clip.head import SparseHead, sparse_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score
from clip_lens_ext.sparse_clip.naming import name_concepts

__all__ = [
    "CodeActivity",
    "CodeBatch",
    "CodeMeasures",
    "Concept",
    "ConceptDrift",
    "ConceptNames",
    "DriftEvent",
    "SparseHead",
    "StreamingActivity",
    "StreamingCodeMeasures",
    "code_measures",
    "concept_drift",
    "modality_score",
    "name_concepts",
    "sparse_clip",
]
