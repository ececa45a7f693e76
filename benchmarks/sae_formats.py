"""The conventions of every SAE format, from the registry, into docs/sae_formats.md: `python -m benchmarks.sae_formats`.

The table is not written down anywhere: a synthetic checkpoint of every layout that the tests know is loaded, and what
came out of it is read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from sae_lens import SAE

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from clip_lens_ext.saes.clip_sae import ARCHITECTURE
from clip_lens_ext.saes.formats import formats

PAGE = Path(__file__).parent.parent / "docs" / "sae_formats.md"


def section() -> str:
    """The table of conventions; then name, layout and function of each format, as its own file says them."""
    parts = [
        f"{len(formats)} formats: {', '.join(f'`{name}`' for name in formats)}. What each layout becomes, read off SAEs that were "
        "loaded from synthetic files of it:",
        conventions(),
        "\"To be said\": keywords without which the layout does not load, beside the hook; and what stays open.",
    ]
    for name, family in formats.items():
        parts.append(f"### `{name}`\n\n{(family.__doc__ or '').strip()}")
    return "\n\n".join(parts)


def conventions() -> str:
    """One row for each layout."""
    from oracles.checkpoints import LAYOUTS

    rows = []
    for layout, write in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            written = write(Path(folder))
            sae = cle.load_sae(written.path, **written.keywords)
        said = [f"`{name}`" for name in written.keywords if name != "hook_name"]
        said += [f"`{name}` is open" for name in sae.cfg.metadata.ambiguous or ()]
        bias = "no" if not sae.cfg.apply_b_dec_to_input else "yes"
        rows.append([
            layout, f"`{sae.cfg.architecture()}`", bias if sae.b_dec.any() else "has none", latents(sae), inputs(sae), ", ".join(said),
        ])  # fmt: skip
    return table(["layout", "class", "input less `b_dec`", "latents", "inputs", "to be said"], rows)


def latents(sae: SAE[Any]) -> str:
    """In words, when a latent is active and what it is then."""
    cfg = sae.cfg
    if cfg.architecture() != ARCHITECTURE:
        return {"standard": "relu", "topk": "k greatest, relu", "jumprelu": "above a threshold", "gated": "gated"}[cfg.architecture()]
    words = {"relu": "relu", "topk": "k greatest", "threshold": "from a threshold on" if cfg.inclusive else "above a threshold"}
    sign = "" if cfg.activation == "relu" else ", of either sign" if cfg.keep_sign else ", relu"
    return words[cfg.activation] + sign + (f", soft cap {cfg.soft_cap:g}" if cfg.soft_cap else "")


def inputs(sae: SAE[Any]) -> str:
    """In words, what is done to the activations first."""
    if sae.cfg.normalize_activations == "layer_norm":
        return "layer norm, undone in the end"
    if sae.cfg.architecture() == ARCHITECTURE and (sae.input_mean.any() or float(sae.input_scale) != 1):
        return "less a mean, scaled; undone in the end"
    return "as they are"


def main() -> None:
    """Write the section."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    write_section("formats", section(), PAGE)


if __name__ == "__main__":
    main()
