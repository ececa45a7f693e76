"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.additive import additive_attribution, feature_ablation
from clip_lens_ext.sparse_clip.beside_dense import BesideDense, beside_dense
from clip_lens_ext.sparse_clip.caption_steering import caption_steering
from clip_lens_ext.sparse_clip.caption_steering_result import CaptionSteering
from clip_lens_ext.sparse_clip.caption_tokens import CaptionTokenizer
from clip_lens_ext.sparse_clip.caption_training import CaptionTraining, train_captioner
from clip_lens_ext.sparse_clip.captioner import Captions, SparseCaptioner, sparse_captioner
from clip_lens_ext.sparse_clip.code_measures import CodeBatch, StreamingCodeMeasures, code_measures
from clip_lens_ext.sparse_clip.code_measures_result import CodeMeasures
from clip_lens_ext.sparse_clip.concept_names import Concept, ConceptNames
from clip_lens_ext.sparse_clip.decomposition_result import Decomposition
from clip_lens_ext.sparse_clip.drift import concept_drift
from clip_lens_ext.sparse_clip.drift_result import ConceptDrift, DriftEvent
from clip_lens_ext.sparse_clip.head import SparseHead, add_sparse_heads, dense_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score
from clip_lens_ext.sparse_clip.naming import name_concepts
from clip_lens_ext.sparse_clip.pairs import EmbeddedPairs, embed_pairs
from clip_lens_ext.sparse_clip.splice_decomposition import decompose
from clip_lens_ext.sparse_clip.steering import ConceptFeatures, features_of, steer, steered
from clip_lens_ext.sparse_clip.steering_data import SteeringData
from clip_lens_ext.sparse_clip.steering_effect import steering_effect
from clip_lens_ext.sparse_clip.steering_result import SteeringEffect
from clip_lens_ext.sparse_clip.store import load_sparse_clip, save_sparse_clip
from clip_lens_ext.sparse_clip.train import train_sparse_clip
from clip_lens_ext.sparse_clip.training_result import SparseCheckpoint, SparseTraining

__all__ = [
    "BesideDense",
    "CaptionSteering",
    "CaptionTokenizer",
    "CaptionTraining",
    "Captions",
    "CodeActivity",
    "CodeBatch",
    "CodeMeasures",
    "Concept",
    "ConceptDrift",
    "ConceptFeatures",
    "ConceptNames",
    "Decomposition",
    "DriftEvent",
    "EmbeddedPairs",
    "SparseCaptioner",
    "SparseCheckpoint",
    "SparseHead",
    "SparseTraining",
    "SteeringData",
    "SteeringEffect",
    "StreamingActivity",
    "StreamingCodeMeasures",
    "additive_attribution",
    "beside_dense",
    "caption_steering",
    "code_measures",
    "concept_drift",
    "decompose",
    "dense_clip",
    "embed_pairs",
    "feature_ablation",
    "features_of",
    "load_sparse_clip",
    "modality_score",
    "name_concepts",
    "save_sparse_clip",
    "sparse_captioner",
    "add_sparse_heads",
    "steer",
    "steered",
    "steering_effect",
    "train_captioner",
    "train_sparse_clip",
]
