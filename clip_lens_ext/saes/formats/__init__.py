"""The families of SAE checkpoints, one file each, and the registry `formats` that finds the one for a path."""

from clip_lens_ext.saes.formats import (
    attributing_clip,
    clip_topk_sae,
    clipscope,
    dictionary_learning,
    dn_cbm,
    key_map,
    msae,
    overcomplete,
    patchsae,
    prisma,
    sae_lens_format,
    saev,
    sparsify,
)
from clip_lens_ext.saes.formats.registry import Format, FormatRegistry, formats, register_format

for _name, _family in {
    "sae_lens": sae_lens_format,
    "prisma": prisma,
    "saev": saev,
    "attributing_clip": attributing_clip,
    "dictionary_learning": dictionary_learning,
    "msae": msae,
    "dn_cbm": dn_cbm,
    "patchsae": patchsae,
    "clipscope": clipscope,
    "clip_topk_sae": clip_topk_sae,
    "overcomplete": overcomplete,
    "sparsify": sparsify,
    "key_map": key_map,
}.items():
    register_format(_name, _family)

__all__ = ["Format", "FormatRegistry", "formats", "register_format"]
