"""The rules by name, each with the cut that it takes where none is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.rules.cross_covariance import cross_covariance
from clip_lens_ext.spectrum.rules.generalised import generalised
from clip_lens_ext.spectrum.rules.intersection import intersection
from clip_lens_ext.spectrum.rules.max_rayleigh import max_rayleigh
from clip_lens_ext.spectrum.rules.pooled import pooled
from clip_lens_ext.spectrum.rules.rule import Found
from clip_lens_ext.spectrum.rules.spectral_gap import spectral_gap
from clip_lens_ext.spectrum.sources import Question


@dataclass(frozen=True)
class Rule:
    """A definition of the noise subspace.

    Attributes:
        name: goes into the result.
        find: the definition.
        cut: name of the cut where none is given.
    """

    name: str
    find: Callable[[Question, Cut], Found]
    cut: str = "marchenko_pastur"


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("intersection", intersection),
        Rule("pooled", pooled),
        Rule("max_rayleigh", max_rayleigh),
        Rule("cross_covariance", cross_covariance, cut="permutation"),
        Rule("generalised", generalised),
        Rule("spectral_gap", spectral_gap, cut="gap"),
    )
}
"""Another one is added with `RULES["name"] = Rule("name", find)`, `find(question, cut)` giving a `Found`."""


def find_rule(rule: str | Rule) -> Rule:
    """The rule of a name; a `Rule` is itself.

    Raises:
        InputError: there is none; it lists near names.

    Example:
        >>> find_rule("cross_covariance").cut
        'permutation'
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise InputError(f"no rule {rule!r}; there are {', '.join(RULES)}{near(str(rule), RULES)}")
    return RULES[rule]
