"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.head import SparseHead, sparse_clip

__all__ = ["SparseHead", "sparse_clip"]
