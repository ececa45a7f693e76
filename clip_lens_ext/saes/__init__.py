"""Sparse dictionaries at a hook: load them, attach them, encode with them, train them."""

from clip_lens_ext.saes.check import SAECheck, check_sae
from clip_lens_ext.saes.codes import SparseCodes, encode
from clip_lens_ext.saes.formats import formats
from clip_lens_ext.saes.load import load_sae
from clip_lens_ext.saes.splice import SplicedSAE
from clip_lens_ext.saes.train import train_sae, train_saes

__all__ = [
    "SAECheck",
    "SparseCodes",
    "SplicedSAE",
    "check_sae",
    "encode",
    "formats",
    "load_sae",
    "train_sae",
    "train_saes",
]
