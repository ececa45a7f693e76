"""A decision as an aligned table of plain text, for terminals and logs."""

from __future__ import annotations

from clip_lens_ext.explanation import Explanation
from clip_lens_ext.plots.page import signed


def explanation_table(explanation: Explanation, *, decision: int = 0) -> str:
    """The top latents of one decision, by attribution patching and by the Logit Lens, in plain ASCII lines.

    Args:
        explanation: from `explain_images`.
        decision: which of `explanation.decisions`.

    Returns:
        Text without a final newline; `explanation_legend` says what the columns mean.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.explain import explain_images
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(1, seed=0, split="test", classes=["crane"]).images)
        >>> found = explain_images(clip, pixels, sae, "a photo of a crane", k=3, progress=False)
        >>> print(explanation_table(found).splitlines()[2])
          by attribution patching
    """
    shown = explanation.decisions[decision]
    frame = shown.to_frame(scale=explanation.scale)
    lens_missing = bool(shown.logit_lens.isnan().any())
    head = ("latent", "activation", "attribution", "exact ablation", "Logit Lens", "attr. rank", "lens rank")
    lines = [f'{shown.image}   "{shown.prompt}"',
             f"  {explanation.unit} {shown.prediction:+.4f}, {len(frame)} of {explanation.d_sae:,} latents active"]
    width = [max(10, len(word)) for word in head]
    for title, column in (("attribution patching", "rank"), ("the Logit Lens", "logit_lens_rank")):
        if column == "logit_lens_rank" and lens_missing:
            continue
        lines += [f"  by {title}", "  " + "  ".join(word.rjust(n) for word, n in zip(head, width, strict=True))]
        for row in frame.sort_values(column, kind="stable").head(explanation.k).itertuples():
            lens = ("-", "-") if lens_missing else (signed(row.logit_lens, 4), str(row.logit_lens_rank))
            cells = (str(row.latent), f"{row.activation:.3f}", signed(row.attribution, 3),
                     signed(row.exact_ablation, 3), lens[0], str(row.rank), lens[1])
            lines.append("  " + "  ".join(cell.rjust(n) for cell, n in zip(cells, width, strict=True)))
    greatest = shown.top(3, "exact")
    named = [f"latent {latent} {signed(exact * explanation.scale, 3)}"
             for latent, exact in zip(shown.latent[greatest].tolist(), shown.exact[greatest].tolist(), strict=True)]
    lines.append(f"  greatest exact ablations: {', '.join(named)}")
    agreement = f"attribution {shown.agreement['attribution']:+.2f}"
    if not lens_missing:
        agreement += f", Logit Lens {shown.agreement['logit_lens']:+.2f}"
    lines.append(f"  rank correlation with exact ablation over all active latents: {agreement}")
    return "\n".join(lines)


def explanation_legend(explanation: Explanation) -> str:
    """What the columns of `explanation_table` mean, with units and sign."""
    y = explanation.unit
    unit = "cosine points (100 x cosine)" if y == "cosine" else y
    n = explanation.n_tokens
    activation = f"summed over the {n} tokens that the SAE reads" if n > 1 else "in the SAE's units"
    lines = [
        f"attribution and exact ablation are in {unit}; positive = the latent raises the {y}",
        f"  activation      {activation}",
        f"  attribution     activation x gradient of the {y}: estimates exact ablation from one backward pass",
        f"  exact ablation  {y} as it is minus {y} with this latent set to zero: measured",
        f"  Logit Lens      {y} of the latent's decoder row alone with the prompt, whatever the image; not in points",
        "  attr. rank, lens rank: place among all active latents by attribution and by the Logit Lens",
        f"model {explanation.model}, SAE at {explanation.hook_name} on {explanation.token_scope} tokens, "
        f"error term {explanation.error_term}",
        *explanation.notes,
    ]
    return "\n".join(lines)
