"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.beside_dense import BesideDense, beside_dense
from clip_lens_ext.sparse_clip.head import SparseHead, dense_clip, sparse_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score
from clip_lens_ext.sparse_clip.pairs import EmbeddedPairs, embed_pairs
from clip_lens_ext.sparse_clip.store import load_sparse_clip, save_sparse_clip
from clip_lens_ext.sparse_clip.train import SparseCheckpoint, SparseTraining, train_sparse_clip

__all__ = [
    "BesideDense",
    "CodeActivity",
    "EmbeddedPairs",
    "SparseCheckpoint",
    "SparseHead",
    "SparseTraining",
    "StreamingActivity",
    "beside_dense",
    "dense_clip",
    "embed_pairs",
    "load_sparse_clip",
    "modality_score",
    "save_sparse_clip",
    "sparse_clip",
    "train_sparse_clip",
]
