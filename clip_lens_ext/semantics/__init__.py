"""What a latent means: its most activating samples, its label, and how clear that is."""

from clip_lens_ext.semantics.activity import LatentActivity
from clip_lens_ext.semantics.alignment import align
from clip_lens_ext.semantics.clarity import clarity
from clip_lens_ext.semantics.cropped import crop_pictures
from clip_lens_ext.semantics.crops import ReferenceCrops, crop_references
from clip_lens_ext.semantics.drawn_text import draw_word, mask_boxes
from clip_lens_ext.semantics.flag_results import Evidence, Flag, Flags
from clip_lens_ext.semantics.flags import flag_components
from clip_lens_ext.semantics.intervention_effects import InterventionEffects
from clip_lens_ext.semantics.interventions import Intervention, measure_interventions
from clip_lens_ext.semantics.labels import Alignment, Label, LabelUniqueness, label_uniqueness
from clip_lens_ext.semantics.latent_scores import LatentScores
from clip_lens_ext.semantics.monosemanticity import monosemanticity
from clip_lens_ext.semantics.picture_senses import find_picture_senses
from clip_lens_ext.semantics.polysemanticity import polysemanticity
from clip_lens_ext.semantics.redundancy import redundancy
from clip_lens_ext.semantics.reference_embeddings import ReferenceEmbeddings, embed_references
from clip_lens_ext.semantics.references import LatentReferences, References, collect_references
from clip_lens_ext.semantics.scorers import DecoderProjection, EmptyPrompt
from clip_lens_ext.semantics.sense_results import PictureSenses
from clip_lens_ext.semantics.soft_wpmi import SoftWPMI
from clip_lens_ext.semantics.streaming import StreamingClarity, StreamingMonosemanticity
from clip_lens_ext.semantics.switch_off import switch_off
from clip_lens_ext.semantics.switched_off import SwitchedOff
from clip_lens_ext.semantics.term_embeddings import TermEmbeddings
from clip_lens_ext.semantics.vocabulary import Vocabulary
from clip_lens_ext.semantics.word_senses import WordSenses, find_word_senses
from clip_lens_ext.semantics.wordnet import Sense, WordNet, read_wordnet

__all__ = [
    "Alignment",
    "DecoderProjection",
    "EmptyPrompt",
    "Evidence",
    "Flag",
    "Flags",
    "Intervention",
    "InterventionEffects",
    "Label",
    "LabelUniqueness",
    "LatentActivity",
    "LatentReferences",
    "LatentScores",
    "PictureSenses",
    "ReferenceCrops",
    "ReferenceEmbeddings",
    "References",
    "Sense",
    "SoftWPMI",
    "StreamingClarity",
    "StreamingMonosemanticity",
    "SwitchedOff",
    "TermEmbeddings",
    "Vocabulary",
    "WordNet",
    "WordSenses",
    "align",
    "clarity",
    "collect_references",
    "crop_pictures",
    "crop_references",
    "draw_word",
    "embed_references",
    "find_picture_senses",
    "find_word_senses",
    "flag_components",
    "label_uniqueness",
    "mask_boxes",
    "measure_interventions",
    "monosemanticity",
    "polysemanticity",
    "read_wordnet",
    "redundancy",
    "switch_off",
]
