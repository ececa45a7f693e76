"""What a latent means."""

from clip_lens_ext.semantics.references import LatentReferences, References, collect_references

__all__ = ["LatentReferences", "References", "collect_references"]
