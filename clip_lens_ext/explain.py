"""The main job as one call: which SAE latents drive the model's score of a picture, with the check of every number.

For each picture and prompt: attribution patching beside exact ablation and the Logit Lens for every active latent,
where on the picture the top latents fire, and the reference images that activate them most. The prefix of the model
runs once per picture, and all methods share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.logit_lens import logit_lens
from clip_lens_ext.attribution.patching import attribution_patching
from clip_lens_ext.attribution.ranks import spearman
from clip_lens_ext.attribution.reach import carries_stream
from clip_lens_ext.attribution.site import ErrorTerm, Site, open_site
from clip_lens_ext.attribution.targets import Target, text_target
from clip_lens_ext.data import ImageBatches, Preprocess, image_batches
from clip_lens_ext.errors import InputError
from clip_lens_ext.explanation import Decision, Explanation
from clip_lens_ext.saes.splice import sae_hook_name
from clip_lens_ext.semantics.references import References, collect_references
from clip_lens_ext.towers.clip import HookedCLIP
from clip_lens_ext.towers.positions import TokenScope

_THUMBNAIL = 112  # pixels a side: what a strip of reference images needs


def explain_images(
    clip: HookedCLIP,
    images: Any,
    sae: SAE,
    prompts: str | Sequence[str] | Target,
    *,
    k: int = 5,
    choose: Literal["all", "best"] | Sequence[int] = "all",
    references: References | None = None,
    reference_images: Any = None,
    n_references: int = 8,
    names: Sequence[str] | None = None,
    hook_name: str | None = None,
    token_scope: TokenScope | None = None,
    error_term: ErrorTerm = "kept",
    batch_size: int = 64,
    progress: bool = True,
) -> Explanation:
    """Explain the model's score of each picture for a prompt by the SAE latents that are active on it.

    Args:
        clip: the model.
        images: pictures, as `clip_lens_ext.data.image_batches` takes them: a folder, a list of files, a tensor
            `[sample 3 height width]`, ...; a broken picture is skipped, and is in `.skipped`.
        sae: an SAE of the vision tower.
        prompts: one prompt or several, or a `Target` from `direction_target`.
        k: how many latents of each ranking (attribution, Logit Lens) get heat maps and references.
        choose: `"all"` explains every prompt for every picture, `"best"` only the one with the greatest prediction;
            a list gives the number of the prompt for each picture, by its position in `images`.
        references: from `collect_references`, to be shown; collected from `reference_images` if None.
        reference_images: the pictures of the references, in any form that `images` can have. Without them there are
            no reference pictures.
        n_references: how many to collect and show for each latent.
        names: of the pictures, by position in `images`, instead of their file names or numbers.
        hook_name, token_scope: instead of the SAE's own.
        error_term: whether what the SAE does not reconstruct stays in the activation (`"kept"`) or is `"dropped"`.
        batch_size: edited activations that exact ablation runs at a time, and reference images in a batch.
        progress: draw bars.

    Returns:
        `Explanation`: a `Decision` for every picture and chosen prompt.

    Raises:
        HookNameError: the tower has no such hook.
        InputError: an empty prompt, no readable picture, an SAE that does not fit, or an SAE on tokens without a path
            to the output.

    Example:
        >>> import clip_lens_ext as cle
        >>> from clip_lens_ext.explain import explain_images
        >>> clip, sae, world = cle.planted_clip(), cle.planted_sae(), cle.PlantedWorld(0)
        >>> batch = world.sample(1, seed=0, split="test", classes=["crane"])
        >>> found = explain_images(clip, cle.planted.normalise(batch.images), sae, "a photo of a crane", progress=False)
        >>> decision = found.decisions[0]
        >>> best = decision.latent[decision.top(1)]
        >>> decision.heat[int(best)].shape
        torch.Size([8, 8])
    """
    if min(k, n_references, batch_size) < 1:
        raise InputError(f"k, n_references and batch_size must be at least 1, got {k}, {n_references}, {batch_size}")
    tower = clip.vision
    sae_hook_name(tower, sae, hook_name)  # an SAE that does not fit is no fault of the first picture
    target = prompts if isinstance(prompts, Target) else text_target(clip, prompts)
    batches = image_batches(images, preprocess=clip.preprocess)
    if names is not None and len(names) != batches.n_samples:
        raise InputError(f"{len(names)} names for {batches.n_samples} pictures")
    _check_choice(choose, target, batches.n_samples)
    view = _view(clip.preprocess)
    decisions: list[Decision] = []
    with tqdm(total=batches.n_samples, desc="explaining", unit="image", disable=not progress) as bar:
        for batch in batches:
            for pixels, file_name, index in zip(batch.pixels, batch.names, batch.indexes, strict=True):
                name = file_name if names is None else str(names[index])
                x = pixels[None].to(tower.cfg.device, tower.cfg.dtype)
                try:
                    site = open_site(tower, x, sae, hook_name=hook_name, token_scope=token_scope, error_term=error_term)
                    chosen = _chosen(site, target, choose, index)
                    decisions += _decide(site, chosen, name, view(pixels), k, batch_size)
                except InputError as error:
                    raise InputError(f"picture {name!r}: {error}") from error
                bar.update()
    shown = sorted({latent for decision in decisions for latent in _shown(decision, k)})
    if references is None and reference_images is not None:
        references = collect_references(
            tower, reference_images, sae, k=n_references, hook_name=hook_name, token_scope=token_scope, latents=shown,
            preprocess=clip.preprocess, batch_size=batch_size, progress=progress,
        )
    pictures: dict[int, Tensor] = {}
    if references is not None and reference_images is not None:
        batches_of_references = image_batches(reference_images, preprocess=clip.preprocess)
        pictures = _reference_pictures(references, shown, n_references, batches_of_references, view)
    return Explanation(
        decisions=tuple(decisions), k=k, n_references=n_references, unit=target.unit, model=tower.cfg.model_name,
        hook_name=site.hook_name, token_scope=site.positions.scope, n_tokens=site.codes.n_token, d_sae=site.codes.d_sae,
        error_term=site.error_term, grid=_grid(site), first_patch=_first_patch(site), references=references,
        reference_pictures=pictures, notes=_notes(site, clip.preprocess, bool(pictures)),
        skipped=tuple(batches.skipped),
        provenance={**site.provenance(), "data_fingerprint": batches.fingerprint},
    )


def _check_choice(choose: str | Sequence[int], target: Target, n_images: int | None) -> None:
    if isinstance(choose, str):
        if choose not in ("all", "best"):
            raise InputError(f"choose is 'all', 'best' or the number of a prompt for each picture, got {choose!r}")
    elif len(choose) != n_images or not all(0 <= index < len(target) for index in choose):
        raise InputError(f"choose needs a number in 0..{len(target) - 1} for each of the {n_images} pictures")


def _chosen(site: Site, target: Target, choose: str | Sequence[int], index: int) -> Target:
    if choose == "all":
        return target
    one = int(site.predict(target)[0].argmax()) if isinstance(choose, str) else choose[index]
    return target.select([one])


def _decide(site: Site, target: Target, name: str, picture: Tensor, k: int, batch_size: int) -> list[Decision]:
    """The decisions of one picture, one per target."""
    patching = attribution_patching(site.tower, site, site.sae, target)
    exact = exact_ablation(site.tower, site, site.sae, target, batch_size=batch_size, progress=False).value.cpu()
    value = patching.value.cpu()
    lens = logit_lens(site.tower, site, site.sae, target).value.cpu() if _has_lens(site) else value * torch.nan
    decisions = []
    for index, label in enumerate(target.labels):
        decision = Decision(
            image=name, prompt=label, picture=picture, prediction=float(patching.prediction[0, index]),
            latent=patching.latent.cpu(), activation=patching.activation.cpu(), attribution=value[:, index],
            exact=exact[:, index], logit_lens=lens[:, index],
            agreement={"attribution": spearman(value[:, index], exact[:, index]),
                       "logit_lens": spearman(lens[:, index], exact[:, index]) if _has_lens(site) else float("nan")},
            heat={}, off_grid={},
        )
        if _reads_patches(site):
            for latent in _shown(decision, k):
                decision.heat[latent], decision.off_grid[latent] = _heat(site, latent)
        decisions.append(decision)
    return decisions


def _shown(decision: Decision, k: int) -> list[int]:
    both = torch.cat([decision.top(k, "attribution"), decision.top(k, "logit_lens")])
    return decision.latent[both].unique().tolist()


def _has_lens(site: Site) -> bool:
    return carries_stream(site.hook_name)


def _reads_patches(site: Site) -> bool:
    return site.positions.scope in ("patches", "all") and site.tower.cfg.patch_size is not None


def _notes(site: Site, preprocess: Preprocess | None, referenced: bool) -> tuple[str, ...]:
    notes = []
    if not _reads_patches(site):
        what = {"cls": "the CLS token", "pooled": "the pooled vector"}.get(site.positions.scope, site.positions.scope)
        notes.append(f"no heat maps: the SAE reads {what}, so a latent says whether it fires, and not where")
    if not _has_lens(site):
        notes.append(f"no Logit Lens: it reads vectors of the residual stream, and {site.hook_name} gives none")
    if not referenced:
        notes.append("no reference images: none were given to look among")
    if preprocess is None:
        notes.append("colours are stretched to each picture's own range: the model's preprocessing is not known")
    return tuple(notes)


def _grid(site: Site) -> tuple[int, int]:
    cfg = site.tower.cfg
    assert cfg.image_size is not None  # clip.vision is a vision tower
    assert cfg.patch_size is not None
    return cfg.image_size[0] // cfg.patch_size[0], cfg.image_size[1] // cfg.patch_size[1]


def _first_patch(site: Site) -> int:
    """Patches are the last tokens of the sequence, row by row; CLS comes before them."""
    height, width = _grid(site)
    return site.tower.cfg.n_ctx - height * width


def _heat(site: Site, latent: int) -> tuple[Tensor, float]:
    """Activation of a latent at every patch `[grid_height grid_width]`, and summed over the other tokens."""
    height, width = _grid(site)
    codes = site.codes
    own = codes.latent == latent
    place = codes.position.to(own.device)[0, codes.token[own]] - _first_patch(site)
    value = codes.value[own].float()
    heat = value.new_zeros(height * width).index_add_(0, place[place >= 0], value[place >= 0])
    return heat.reshape(height, width).cpu(), float(value[place < 0].sum())


def _view(preprocess: Preprocess | None) -> Callable[[Tensor], Tensor]:
    """What undoes the normalisation of `preprocess`: floats `[3 height width]` to uint8."""
    ends: tuple[Tensor, Tensor] | None = None
    if preprocess is not None:
        # What becomes of black and of white are the two ends of each channel, whatever its mean and spread.
        black, white = (preprocess(Image.new("RGB", (64, 64), colour)).float() for colour in ("black", "white"))
        ends = black.mean(dim=(1, 2))[:, None, None], white.mean(dim=(1, 2))[:, None, None]

    def view(pixels: Tensor) -> Tensor:
        pixels = pixels.float().cpu()
        low, high = ends or (pixels.amin(), pixels.amax())
        return ((pixels - low) / (high - low).clamp_min(1e-12) * 255).round().clamp(0, 255).to(torch.uint8)

    return view


def _reference_pictures(
    references: References, latents: list[int], n: int, images: ImageBatches, view: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """The reference pictures of some latents, by sample, at most 112 pixels a side."""
    samples = sorted({int(sample) for latent in latents for sample in references.of(latent).sample[:n]})
    if not samples:
        return {}
    sample_at = dict(zip(references.indexes[torch.tensor(samples)].tolist(), samples, strict=True))
    found: dict[int, Tensor] = {}
    for batch in images.select(list(sample_at)):
        for pixels, index in zip(batch.pixels, batch.indexes, strict=True):
            picture = view(pixels)
            largest = max(picture.shape[1:])
            if largest > _THUMBNAIL:
                size = [max(1, side * _THUMBNAIL // largest) for side in picture.shape[1:]]
                picture = F.interpolate(picture[None].float(), size=size, mode="area")[0].round().byte()
            found[sample_at[index]] = picture
    return found
