"""Does an SAE fit the activations that it is put on? Measured on pictures, with the likely causes where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.data import Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.saes.quality import Reconstruction, ReconstructionQuality
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower

FITS = 0.5
"""Explained variance from which an SAE is said to fit. Published SAEs of CLIP explain 0.7 and more; a wrong hook, wrong
tokens or a wrong convention mostly less than nothing."""
BETTER = 0.1
"""By how much another reading has to explain more, to be named as a cause."""
_N_CONVENTIONS = 4


@dataclass(frozen=True)
class Cause:
    """Another reading of the SAE, under which it explains more.

    Attributes:
        what: in words.
        explained_variance: under it.
        change: what to pass to get it, where there is such a keyword.
    """

    what: str
    explained_variance: float
    change: dict[str, Any]


@dataclass(frozen=True)
class SAECheck:
    """What `check_sae` found.

    Attributes:
        verdict: `"fits"` or `"suspicious"`.
        quality: explained variance, cosine, L0 and dead latents over the SAE's tokens.
        embedding_cosine: mean cosine of the tower's embedding with that of the pass on the reconstruction alone.
        embedding_cosine_with_error: the same with the error term, where nothing is lost: 1 but for rounding.
        causes: readings that explain more, the best first.
        hook_name, token_scope: where it was put.
        n_images: how many pictures were read.
        skipped: pictures that could not be read.
    """

    verdict: Literal["fits", "suspicious"]
    quality: ReconstructionQuality
    embedding_cosine: float
    embedding_cosine_with_error: float
    causes: tuple[Cause, ...]
    hook_name: str
    token_scope: str
    n_images: int
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        q = self.quality
        lines = [
            f"{self.verdict}: explained variance {q.explained_variance:.3f} at {self.hook_name}, "
            f"{self.token_scope} tokens",
            f"  {self.n_images} pictures, {q.n_rows:,} rows: cosine {q.cosine:.3f}, L0 {q.l0:.1f}, latents that never "
            f"fire {100 * q.dead_latents:.1f}%",
            f"  embedding on the reconstruction alone: cosine {self.embedding_cosine:.3f} with the plain one "
            f"({self.embedding_cosine_with_error:.3f} with the error term)",
        ]
        if self.skipped:
            lines.append(f"  skipped {len(self.skipped)}: {', '.join(self.skipped[:5])}")
        for cause in self.causes:
            change = ", ".join(f"{name}={value!r}" for name, value in cause.change.items())
            lines.append(
                f"  {cause.what}: explained variance {cause.explained_variance:.3f}" + f" ({change})" * bool(change)
            )
        if self.verdict == "suspicious" and not self.causes:
            lines.append("  no other hook, tokens or convention explains more: is it an SAE of this model?")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def check_sae(
    tower: HookedTower,
    images: Any,
    sae: SAE,
    *,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    preprocess: Preprocess | None = None,
    n_images: int = 64,
    batch_size: int = 16,
    progress: bool = True,
) -> SAECheck:
    """Measure an SAE on a tower's activations, and look for the reading under which it fits best.

    Tried besides the SAE's own: the same kind of hook at every other block, other tokens, `b_dec` subtracted or not,
    and inputs that are centred and scaled, or of unit length. What explains at least 0.1 more is named.

    Args:
        tower: the tower that the SAE belongs to.
        images: pictures (or prompts' ids, for a text tower), as everywhere: a tensor, a folder, a data set, a loader.
        sae: the SAE.
        hook_name, token_scope: instead of the SAE's own.
        preprocess: of the pictures in a folder.
        n_images: how many are read at most.
        batch_size: at a time.
        progress: show a bar.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: no picture can be read, or the SAE does not fit the hook's width.

    Example:
        >>> import clip_lens_ext as cle
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> pixels = cle.planted.normalise(world.sample(8, seed=0, split="test").images)
        >>> check_sae(clip.vision, pixels, sae, progress=False).verdict
        'fits'
    """
    name = sae_hook_name(tower, sae, hook_name)
    batches = image_batches(images, preprocess=preprocess, batch_size=min(batch_size, n_images))
    seen, cosines, kept, n_read = Reconstruction(sae.cfg.d_sae), [], [], 0
    scope: str | None = token_scope or sae.cfg.metadata.token_scope
    with tqdm(total=n_images, desc="checking the SAE", unit="image", disable=not progress) as bar:
        for batch in batches:
            x = batch.pixels.to(tower.cfg.device)
            x = x.to(tower.cfg.dtype) if x.is_floating_point() else x
            x = x[: n_images - n_read]
            activation = tower.run_to(x, name)
            scope = scope or default_scope(activation)
            positions = _positions(tower, scope, x)
            positions.check(activation, name)
            codes, rows, back = _reconstruct(sae, positions.take(activation))
            seen.update(rows, back, codes)
            cosines.append(_embedding_cosines(tower, sae, name, scope, x, activation))
            kept.append(x)
            n_read += len(x)
            bar.update(len(x))
            if n_read >= n_images:
                break
    if not n_read or scope is None:
        raise InputError("no picture to check the SAE on could be read")
    quality = seen.result()
    causes = _causes(tower, sae, torch.cat(kept)[:32], name, scope, quality.explained_variance, progress)
    fits = quality.explained_variance >= FITS and not causes
    dropped, with_error = torch.cat(cosines, dim=1).mean(dim=1).tolist()
    skipped = tuple(skip.name for skip in batches.skipped)
    return SAECheck(
        "fits" if fits else "suspicious", quality, dropped, with_error, causes, name, scope, n_read, skipped
    )


def explained_variance(sae: SAE, rows: Tensor) -> float:
    """Of one block of rows `[row d_in]`; minus infinity where it does not exist."""
    seen = Reconstruction(sae.cfg.d_sae)
    codes, flat, back = _reconstruct(sae, rows)
    seen.update(flat, back, codes)
    found = seen.result().explained_variance
    return found if found == found else float("-inf")


def with_bias_flipped(sae: SAE) -> SAE:
    """A copy that subtracts `b_dec` from its input where the SAE does not, and the other way round."""
    other = copy.deepcopy(sae)
    other.cfg.apply_b_dec_to_input = not sae.cfg.apply_b_dec_to_input
    return other


def _positions(tower: HookedTower, scope: Any, x: Tensor) -> TokenPositions:
    return TokenPositions(scope, tower.eot_positions(x) if tower.cfg.tower == "text" else None, tower.n_prefix)


def _reconstruct(sae: SAE, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.reshape(-1, *rows.shape[-1:]) if sae.cfg.reshape_activations == "none" else rows.flatten(0, 1)
    codes = sae.encode(rows)
    back = sae.decode(codes).to(rows.dtype)
    return codes, rows.flatten(1), back.flatten(1)


def _embedding_cosines(tower: HookedTower, sae: SAE, name: str, scope: Any, x: Tensor, activation: Tensor) -> Tensor:
    """`[2 sample]`: with the reconstruction alone, and with the error term."""

    def embedding() -> Tensor:
        # From the hook on, where the tail can start there: the SAE sits at the hook itself.
        if name not in tower.split_names():
            return tower(x).float()
        return tower.run_from(name, activation, tokens=x if tower.cfg.tower == "text" else None).float()

    plain = embedding()
    found = []
    for keep in (False, True):
        with tower.saes(sae, use_error_term=keep, hook_name=name, token_scope=scope):
            found.append(F.cosine_similarity(embedding(), plain, dim=-1))
    return torch.stack(found)


def _causes(
    tower: HookedTower, sae: SAE, x: Tensor, name: str, scope: str, explained: float, progress: bool
) -> tuple[Cause, ...]:
    found = []
    elsewhere = _same_hook_elsewhere(tower, name)
    scopes = [] if scope == "pooled" else [one for one in ("cls", "patches", "all", "eot") if one != scope]
    total = len(elsewhere) + len(scopes) + _N_CONVENTIONS
    with tqdm(total=total, desc="trying other readings", unit="reading", disable=not progress) as bar:

        def consider(what: str, change: dict[str, Any], measure: Callable[[], float]) -> None:
            bar.update()
            try:
                value = measure()
            except InputError:
                return  # a scope that this hook or tower does not have
            if value > explained + BETTER:
                found.append(Cause(what, value, change))

        def rows(activation: Tensor, hook: str, tokens: Any) -> Tensor:
            positions = _positions(tower, tokens, x)
            positions.check(activation, hook)
            return positions.take(activation)

        def at(activation: Tensor, hook: str, tokens: Any = scope) -> float:
            return explained_variance(sae, rows(activation, hook, tokens))

        def there(activation: Tensor, hook: str) -> None:
            consider(f"at {hook}", {"hook_name": hook}, partial(at, activation, hook))

        here = _tapped(tower, x, name, elsewhere, there)
        for tokens in scopes:
            consider(f"on {tokens} tokens", {"token_scope": tokens}, partial(at, here, name, tokens))
        for reading in _conventions(sae, rows(here, name, scope)):
            consider(*reading)
    return tuple(sorted(found, key=lambda cause: -cause.explained_variance)[:5])


def _same_hook_elsewhere(tower: HookedTower, name: str) -> list[str]:
    """The hooks of the same kind and width in the other blocks."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return []
    others = [".".join(["blocks", str(layer), *parts[2:]]) for layer in range(tower.cfg.n_layers)]
    return [other for other in others if other != name and tower.hook_width(other) == tower.hook_width(name)]


def _tapped(
    tower: HookedTower, x: Tensor, name: str, elsewhere: list[str], there: Callable[[Tensor, str], None]
) -> Tensor:
    """The activation at a hook; on the same pass `there` sees those at others, of which none is kept."""
    found: dict[str, Tensor] = {}

    def see(value: Tensor, hook_name: str) -> None:
        if hook_name == name:
            found[name] = value
        else:
            there(value, hook_name)

    *before, last = sorted([name, *elsewhere], key=tower.hook_names().index)
    with tower.hooks(fwd_hooks=[(one, lambda value, hook: see(value, hook.name)) for one in before]):
        see(tower.run_to(x, last), last)  # hooks at the last one itself do not fire
    return found[name]


def _conventions(sae: SAE, here: Tensor) -> Iterator[tuple[str, dict[str, Any], Callable[[], float]]]:
    subtract = not sae.cfg.apply_b_dec_to_input
    words = f"b_dec {'subtracted' if subtract else 'not subtracted'} from the input"
    yield words, {"subtract_b_dec": subtract}, partial(explained_variance, with_bias_flipped(sae), here)
    rows = here.reshape(-1, sae.cfg.d_in)
    mean = rows.mean(dim=0)
    length = float((rows - mean).norm(dim=1).mean())
    for words, scale in (
        ("inputs centred and scaled to unit variance", sae.cfg.d_in**0.5 / length),
        ("inputs centred and scaled to unit length", 1 / length),
    ):
        change = {"input_stats": f"(mean of your activations, {scale:.4g})"}
        yield words, change, partial(explained_variance, sae, (rows - mean) * scale)
    yield "inputs of unit length each", {}, partial(explained_variance, sae, F.normalize(rows, dim=1))
