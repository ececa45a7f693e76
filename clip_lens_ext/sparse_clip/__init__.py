"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.code_measures import CodeBatch, StreamingCodeMeasures, code_measures
from clip_lens_ext.sparse_clip.code_measures_result import CodeMeasures
from clip_lens_ext.sparse_clip.head import SparseHead, sparse_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score

__all__ = [
    "CodeActivity", "CodeBatch", "CodeMeasures", "SparseHead", "StreamingActivity", "StreamingCodeMeasures",
    "code_measures", "modality_score", "sparse_clip",
]  # fmt: skip
