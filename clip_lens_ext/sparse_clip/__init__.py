"""CLIP that is sparse by training: a ReLU behind a widened projection in both towers."""

from clip_lens_ext.sparse_clip.additive import additive_attribution, feature_ablation
from clip_lens_ext.sparse_clip.caption_steering import caption_steering
from clip_lens_ext.sparse_clip.caption_steering_result import CaptionSteering
from clip_lens_ext.sparse_clip.caption_tokens import CaptionTokenizer
from clip_lens_ext.sparse_clip.caption_training import CaptionTraining, train_captioner
from clip_lens_ext.sparse_clip.captioner import Captions, SparseCaptioner, sparse_captioner
from clip_lens_ext.sparse_clip.decomposition_result import Decomposition
from clip_lens_ext.sparse_clip.head import SparseHead, sparse_clip
from clip_lens_ext.sparse_clip.metrics import CodeActivity, StreamingActivity, modality_score
from clip_lens_ext.sparse_clip.splice_decomposition import decompose
from clip_lens_ext.sparse_clip.steering import ConceptFeatures, features_of, steer, steered
from clip_lens_ext.sparse_clip.steering_data import SteeringData
from clip_lens_ext.sparse_clip.steering_effect import steering_effect
from clip_lens_ext.sparse_clip.steering_result import SteeringEffect

__all__ = [
    "CaptionSteering",
    "CaptionTokenizer",
    "CaptionTraining",
    "Captions",
    "CodeActivity",
    "ConceptFeatures",
    "Decomposition",
    "SparseCaptioner",
    "SparseHead",
    "SteeringData",
    "SteeringEffect",
    "StreamingActivity",
    "additive_attribution",
    "caption_steering",
    "decompose",
    "feature_ablation",
    "features_of",
    "modality_score",
    "sparse_captioner",
    "sparse_clip",
    "steer",
    "steered",
    "steering_effect",
    "train_captioner",
]
