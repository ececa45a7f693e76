"""The cuts by name."""

from __future__ import annotations

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.spectrum.cuts.cut import Cut
from clip_lens_ext.spectrum.cuts.fixed import Fixed
from clip_lens_ext.spectrum.cuts.gap import Gap
from clip_lens_ext.spectrum.cuts.gavish_donoho import GavishDonoho
from clip_lens_ext.spectrum.cuts.knee import Knee
from clip_lens_ext.spectrum.cuts.marchenko_pastur import MarchenkoPastur
from clip_lens_ext.spectrum.cuts.permutation import Permutation
from clip_lens_ext.spectrum.cuts.variance_share import VarianceShare

CUTS: dict[str, Cut] = {
    "marchenko_pastur": MarchenkoPastur(),
    "marchenko_pastur_median": MarchenkoPastur(level="median"),
    "marchenko_pastur_lower": MarchenkoPastur(edge="lower", level="median"),
    "gavish_donoho": GavishDonoho(),
    "permutation": Permutation(),
    "knee": Knee(),
    "gap": Gap(),
    "variance_share": VarianceShare(),
}
"""Another one is added with `CUTS["name"] = cut`: anything that is called with a `Spectrum` and gives a `Cutoff`."""


def find_cut(cut: str | int | Cut) -> Cut:
    """The cut of a name; a number is `Fixed`, and a cut is itself.

    Raises:
        InputError: there is none; it lists near names.

    Example:
        >>> find_cut(164)
        Fixed(k=164)
        >>> find_cut("variance_share")
        VarianceShare(share=0.01)
    """
    if isinstance(cut, int):
        return Fixed(cut)
    if not isinstance(cut, str):
        if callable(cut):
            return cut
        raise InputError(f"a cut is a name, a number of noise directions or a function, got {type(cut).__name__}")
    if cut not in CUTS:
        raise InputError(f"no cut {cut!r}; there are {', '.join(CUTS)}, and a number{near(cut, CUTS)}")
    return CUTS[cut]
