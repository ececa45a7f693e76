"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.head import SparseHead, sparse_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score

__all__ = ["CodeActivity", "SparseHead", "StreamingActivity", "modality_score", "sparse_clip"]
