"""Where an SAE can be explained: hooks from which the tail can start, and tokens that the output depends on."""

from __future__ import annotations

from clip_lens_ext.errors import InputError
from clip_lens_ext.towers.tower import HookedTower

# What is added to the stream, and the two hooks of the stream between which the block adds it.
_WRITES = {"hook_attn_out": ("hook_resid_pre", "hook_resid_mid"), "hook_mlp_out": ("hook_resid_mid", "hook_resid_post")}

# Which scopes hold a token that the pooled vector is made of; other ways of pooling read every token.
_REACHING: dict[str, tuple[str, ...]] = {
    "cls": ("cls", "all"),
    "eot": ("eot", "patches", "all"),
    "first": ("cls", "all"),
    "last": ("patches", "all"),
    "mean of patches": ("patches", "all"),
}


def stream_hooks(hook_name: str) -> tuple[str, str] | None:
    """The hooks of the residual stream before and after a block adds what a hook carries; None where it carries none.

    Example:
        >>> stream_hooks("blocks.3.hook_attn_out")
        ('blocks.3.hook_resid_pre', 'blocks.3.hook_resid_mid')
        >>> stream_hooks("blocks.3.hook_resid_post") is None
        True
    """
    block, _, last = hook_name.rpartition(".")
    if last not in _WRITES:
        return None
    before, after = _WRITES[last]
    return f"{block}.{before}", f"{block}.{after}"


def carries_stream(hook_name: str) -> bool:
    """Whether a hook carries vectors of the residual stream, or what a block adds to it.

    Example:
        >>> carries_stream("blocks.0.hook_mlp_out"), carries_stream("hook_pooled")
        (True, False)
    """
    return "hook_resid" in hook_name or hook_name == "hook_full_embed" or stream_hooks(hook_name) is not None


def check_start(tower: HookedTower, hook_name: str) -> None:
    """Raise `InputError` where the tail cannot start at a hook."""
    if hook_name not in tower.split_names() and stream_hooks(hook_name) is None:
        raise InputError(
            f"attribution needs a hook at which the tail can start, and {hook_name} carries only a part of the "
            "state; see tower.split_names(), and hook_attn_out and hook_mlp_out of each block"
        )


def is_after_mixing(tower: HookedTower, hook_name: str) -> bool:
    """Whether a hook comes after the last attention layer, so that no token reads another one any more."""
    last = f"blocks.{tower.cfg.n_layers - 1}"
    return hook_name in [f"{last}.hook_{part}" for part in ("attn_out", "resid_mid", "mlp_out", "resid_post")]


def check_path(tower: HookedTower, hook_name: str, scope: str) -> None:
    """Refuse tokens that the pooled vector does not depend on: their gradient is zero, which says nothing.

    Raises:
        InputError: the scope holds no token that reaches the output from this hook.
    """
    pooled = tower.reading.pooled_token() or tower.cfg.pooling
    if is_after_mixing(tower, hook_name) and scope not in _REACHING.get(pooled, (scope,)):
        what = "the mean of the patches" if pooled == "mean of patches" else f"the {pooled} token alone"
        raise InputError(
            f"at {hook_name} the embedding depends on {what}: an SAE on {scope!r} has no path to the output there, so "
            "every attribution would be zero. Take an earlier block"
        )
