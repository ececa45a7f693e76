"""What two results must share to be two parts of one, and what their union says about its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clip_lens_ext.errors import InputError


def check_mergeable(kind: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `InputError` where two results differ in anything but their samples; it names what differs."""
    differ = [f"{name} {mine[name]!r} and {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
    if differ:
        raise InputError(f"these two {kind} do not belong together: they differ in {'; '.join(differ)}")


def same_origin(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of an origin all shards share: the model, the SAE and the target, but not the data."""
    names = ("model", "sae_sha256", "target_fingerprint")
    return {name: (provenance or {}).get(name) for name in names}


def joined_origin(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of both together: the fingerprints of their data side by side, the rest as the first has it."""
    both = "+".join(str(one.get("data_fingerprint")) for one in (mine, theirs))
    return {**mine, "data_fingerprint": both}
