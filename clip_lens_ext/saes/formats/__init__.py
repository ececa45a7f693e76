"""The families of SAE checkpoints, one file each, and the registry `formats` that finds the one for a path."""

from clip_lens_ext.saes.formats import sae_lens_format
from clip_lens_ext.saes.formats.registry import Format, FormatRegistry, formats, register_format

register_format("sae_lens", sae_lens_format)

__all__ = ["Format", "FormatRegistry", "formats", "register_format"]
