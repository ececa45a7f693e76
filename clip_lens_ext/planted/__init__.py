"""A small world with known truth, and the CLIP and the SAEs that were trained on it."""

from clip_lens_ext.planted.load import planted_clip, planted_sae, planted_sparse_clip, preprocess
from clip_lens_ext.planted.measure import PlantedReport, measure_clip
from clip_lens_ext.planted.roles import Compound, Controls, PlantedClass, PlantedKey
from clip_lens_ext.planted.tokenizer import WordTokenizer
from clip_lens_ext.planted.world import TEMPLATE, PlantedBatch, PlantedWorld, normalise

__all__ = [
    "TEMPLATE",
    "Compound",
    "Controls",
    "PlantedBatch",
    "PlantedClass",
    "PlantedKey",
    "PlantedReport",
    "PlantedWorld",
    "WordTokenizer",
    "measure_clip",
    "normalise",
    "planted_clip",
    "planted_sae",
    "planted_sparse_clip",
    "preprocess",
]
