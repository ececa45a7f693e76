"""Candidate definitions of the noise subspace; one rule a file."""

from clip_lens_ext.spectrum.rules.registry import RULES, Rule, find_rule
from clip_lens_ext.spectrum.rules.rule import Found

__all__ = ["RULES", "Found", "Rule", "find_rule"]
