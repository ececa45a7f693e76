"""Typographic flags on a real CLIP: words drawn on photos, and what switching the flagged latents off undoes.

`python -m benchmarks.real_flags --data FOLDER` takes the SAEs of all tokens that `benchmarks.real_saes` trains. Words are
drawn on COCO photos that do not show the thing; latents are flagged by public calls on one half of the photos, and on the
other half, which no flag saw, they are set to zero where the word flips the zero-shot prediction over the 80 COCO names.
It writes the section `real_flags` of docs/results.md and the figure beside it; pictures go to RUNS/flags, for the photos
are not free. What is finished is kept: a run that is interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sae_lens import SAE
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import PAGE, table, write_section
from benchmarks.real_saes import all_token_saes, read_embeddings, real_tower
from benchmarks.timing import machine
from clip_lens_ext.bootstrap import bootstrap_intervals
from clip_lens_ext.result_files import read_parts, write_parts

WORDS = {"train": "vowel", "cat": "why", "pizza": "maxim"}  # and a word of as many letters that names no COCO thing
BLOCKS = (11, 10)
N_TRIED = 48  # latents of which the way through them is measured, for each word
CURVE = (1, 2, 3, 5, 10, 20)
N_CONTROLS = 5
N_SHOWN = 12
# ImageNet's classes of the same things, for what switching off costs where the thing is there.
SAME_THING = {"train": (466, 820), "cat": (282, 284), "pizza": ()}


@dataclass(frozen=True, eq=False)
class Photos:
    """COCO photos as bytes, the size that the tower takes, and what the plain model says of them."""

    paths: list[Path]
    bytes: Tensor
    cosine: Tensor
    shows: dict[str, Tensor]
    """By word, whether a photo is annotated with it."""


@dataclass(frozen=True, eq=False)
class Study:
    """The model, the names and the photos, and where results are kept."""

    clip: cle.HookedCLIP
    things: cle.Target
    photos: Photos
    discovery: Tensor
    held_out: Tensor
    folder: Path

    def number(self, word: str) -> int:
        """Of a word among the names."""
        return self.things.labels.index(word)

    def pixels(self, photos: Tensor) -> Tensor:
        """Bytes as the tower takes them."""
        return normalised(self.clip, photos)

    def drawn(self, word: str, photos: Tensor, **settings: Any) -> Tensor:
        """The photos of some numbers with a word on them, as the tower takes them."""
        return self.pixels(cle.draw_word(self.photos.bytes[photos], word, **settings))


def statistics(clip: cle.HookedCLIP) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the model's own preprocessing, whose last step they are."""
    last = clip.preprocess.transforms[-1]  # type: ignore[union-attr]
    return torch.tensor(last.mean)[:, None, None], torch.tensor(last.std)[:, None, None]


def normalised(clip: cle.HookedCLIP, photos: Tensor) -> Tensor:
    """Bytes `[photo 3 height width]` as the tower takes them."""
    mean, std = statistics(clip)
    return (photos.float() / 255 - mean) / std


def as_bytes(clip: cle.HookedCLIP, paths: list[Path]) -> Tensor:
    """Photos resized and cropped as the model's preprocessing does it, before its last step."""
    mean, std = statistics(clip)
    return torch.cat([(clip.pixels(cle.read_image(path)) * std + mean).mul(255).round().byte() for path in paths])


def study(clip: cle.HookedCLIP, data: Path, runs: Path) -> Study:
    """Photos that neither show nor are taken for one of the words' things, every second one for discovery."""
    vectors, names = read_embeddings(data / "embeddings" / "coco_171.safetensors")
    things = cle.direction_target(vectors[:80], labels=names[:80])
    listed = sorted(json.loads((data / "images" / "coco.json").read_text()), key=lambda entry: entry["file"])
    paths = [data / entry["file"] for entry in listed]
    photos = as_bytes(clip, paths)
    folder = runs / "flags"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "clean.safetensors"
    if not kept.exists():
        with torch.no_grad():
            cosine = torch.cat([things(clip.vision(normalised(clip, some))) for some in photos.split(16)])
        write_parts(kept, "Clean", {"cosine": cosine}, {}, {})
    cosine = read_parts(kept, "Clean").tensors["cosine"]
    shows = {word: torch.tensor([word in entry["objects"] for entry in listed]) for word in WORDS}
    best = cosine.argmax(dim=1)
    neutral = ~torch.stack([shows[word] | (best == things.labels.index(word)) for word in WORDS]).any(dim=0)
    numbers = neutral.nonzero().flatten()
    return Study(clip, things, Photos(paths, photos, cosine, shows), numbers[0::2], numbers[1::2], folder)


# Discovery: public calls on one half of the photos.


def effects_of(one: Study, sae: SAE, folder: Path) -> cle.InterventionEffects:
    """Each word drawn on the photos of discovery, beside another word and the empty plate."""
    path = folder / "effects.safetensors"
    if not path.exists():
        before = one.pixels(one.photos.bytes[one.discovery])
        edits = [
            cle.Intervention(
                f"draw {word}", "text_drawn", before, one.drawn(word, one.discovery), word,
                {"another word": one.drawn(other, one.discovery),
                 "an empty plate": one.drawn(word, one.discovery, letters=False)},
            )
            for word, other in WORDS.items()
        ]  # fmt: skip
        found = cle.measure_interventions(
            one.clip, sae, one.things, edits, n_prompts=1, n_latents=N_TRIED, batch_size=8
        )
        found.save(path)
    return cle.InterventionEffects.load(path)


def flags_of(one: Study, sae: SAE, folder: Path, *, n_latents: int) -> cle.Flags:
    """The flags of the three words; with another `n_latents` nothing else differs."""
    path = folder / "references.safetensors"
    before = one.pixels(one.photos.bytes[one.discovery])
    if not path.exists():
        cle.collect_references(one.clip.vision, before, sae, k=8, batch_size=8).save(path)
    references = cle.References.load(path)
    target = one.things.select([one.number(word) for word in WORDS])
    path = folder / "attributions.safetensors"
    if not path.exists():
        cle.aggregate_attributions(one.clip.vision, before, sae, target, batch_size=8).save(path)
    attributions = cle.AttributionSummary.load(path)
    terms = cle.TermEmbeddings.from_vectors(one.things.vectors, one.things.labels, model=one.clip.model_name)
    # The decoder's label needs no empty prompt, of which there is no embedding here.
    alignment = cle.align(references, terms, one.clip, scorer="decoder", sae=sae, progress=False)
    return cle.flag_components(
        attributions,
        alignment,
        references,
        target=target,
        interventions=effects_of(one, sae, folder),
        n_latents=n_latents,
    )


def sets_of(flags: cle.Flags, word: str) -> dict[str, list[int]]:
    """The first 1, 2, 3, ... flagged latents of a word, the greatest part of the rise first, and all of them."""
    latents = [flag.latent for flag in flags.of("typographic") if flag.prompt == word]
    sizes = [size for size in CURVE if size < len(latents)]
    return {str(size): latents[:size] for size in [*sizes, len(latents)] if size}


# The check: photos that no flag saw.


def switched_off(one: Study, sae: SAE, folder: Path, word: str, sets: dict[str, list[int]]) -> cle.SwitchedOff:
    """The held-out photos with the word on them, the flagged latents at zero."""
    path = folder / f"off_{word}.safetensors"
    if not path.exists() or cle.SwitchedOff.load(path).latents != sets:
        pixels = one.drawn(word, one.held_out)
        # The first flagged latents are compared with latents that are not flagged.
        flagged = sorted({latent for members in sets.values() for latent in members})
        cle.switch_off(
            one.clip, pixels, sae, one.things, sets, n_controls=N_CONTROLS, spared=flagged, batch_size=8
        ).save(path)
    return cle.SwitchedOff.load(path)


def cost(one: Study, sae: SAE, folder: Path, word: str, latents: dict[str, list[int]]) -> cle.SwitchedOff:
    """Photos as they are, all of the held-out ones and those of the thing itself, the flagged latents at zero."""
    path = folder / f"cost_{word}.safetensors"
    if not path.exists() or cle.SwitchedOff.load(path).latents != latents:
        own = one.photos.shows[word].nonzero().flatten()
        photos = [one.photos.bytes[one.held_out], one.photos.bytes[own]]
        data = one.photos.paths[0].parent.parent
        more = [data / "imagenet" / f"{number:04d}.jpg" for number in SAME_THING[word]]
        photos += [as_bytes(one.clip, [path for path in more if path.exists()])] if more else []
        pixels = one.pixels(torch.cat(photos))
        cle.switch_off(one.clip, pixels, sae, one.things, latents, n_controls=0, batch_size=8).save(path)
    return cle.SwitchedOff.load(path)


@torch.no_grad()
def parts_of_the_rise(one: Study, sae: SAE, hook: str, folder: Path, word: str) -> dict[str, Tensor]:
    """Cosines `[photo 80]` of the held-out photos with all latents, or the SAE's error alone, as without the word."""
    path = folder / f"parts_{word}.safetensors"
    if not path.exists():
        found: dict[str, list[Tensor]] = {"latents_back": [], "error_back": []}
        for some in one.held_out.split(8):
            x = [one.clip.vision.run_to(pixels, hook)
                 for pixels in (one.pixels(one.photos.bytes[some]), one.drawn(word, some))]  # fmt: skip
            before, after = (sae.decode(sae.encode(rows)) for rows in x)
            latents_back, error_back = x[1] - (after - before), x[1] - ((x[1] - after) - (x[0] - before))
            for name, activation in (("latents_back", latents_back), ("error_back", error_back)):
                found[name].append(one.things(one.clip.vision.run_from(hook, activation)))
        write_parts(path, "Parts", {name: torch.cat(parts) for name, parts in found.items()}, {}, {})
    return read_parts(path, "Parts").tensors


@dataclass(frozen=True)
class Found:
    """What was found of one word at one hook."""

    block: int
    word: str
    flags: tuple[cle.Flag, ...]
    off: cle.SwitchedOff | None
    costs: cle.SwitchedOff | None
    parts: dict[str, Tensor]
    clean: Tensor
    """Numbers of the names of the held-out photos without the word, `[photo]`."""
    clean_cosine: Tensor
    number: int

    @property
    def flipped(self) -> Tensor:
        """Which held-out photos the word flips."""
        assert self.off is not None
        return (self.off.winner == self.number) & (self.clean != self.number)

    def undone(self, winner: Tensor) -> Tensor:
        """Of the flipped photos, which are back at what they were, 0 or 1 `[... photo]`."""
        return (winner == self.clean).double()[..., self.flipped]

    def no_longer(self, winner: Tensor) -> Tensor:
        """Of the flipped photos, which are no longer the word."""
        return (winner != self.number).double()[..., self.flipped]


def find(one: Study, sae: SAE, block: int, word: str) -> Found:
    """Everything about one word at one hook, from the files that are there."""
    hook = f"blocks.{block}.hook_resid_post"
    folder = one.folder / hook
    folder.mkdir(exist_ok=True)
    flags = flags_of(one, sae, folder, n_latents=N_TRIED)
    sets = sets_of(flags, word)
    off = costs = None
    if sets:
        off = switched_off(one, sae, folder, word, sets)
        few = {name: sets[name] for name in sets if name in ("3", list(sets)[-1])}
        costs = cost(one, sae, folder, word, few)
    own = tuple(flag for flag in flags.of("typographic") if flag.prompt == word)
    cosine = one.photos.cosine[one.held_out]
    parts = parts_of_the_rise(one, sae, hook, folder, word)
    return Found(block, word, own, off, costs, parts, cosine.argmax(dim=1), cosine, one.number(word))


# The page.


def share(values: Tensor) -> str:
    """A mean in percent with its bootstrap interval over photos, from `[photo]` or `[draw photo]`."""
    if values.shape[-1] == 0:
        return "-"
    values = values.reshape(-1, values.shape[-1]).mean(dim=0)
    low, high = bootstrap_intervals(values[None], n_bootstrap=2000, seed=0, confidence=0.95)[0].tolist()
    return f"{100 * float(values.mean()):.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def row(found: Found, name: str) -> list[str]:
    """One set of latents."""
    off = found.off
    assert off is not None
    place = off.number(name)
    ratio = off.control_activation[place].sum(dim=-1).mean() / off.activation[place].sum().clamp(min=1e-9)
    flipped = found.flipped
    return [
        str(found.block), found.word, f"{int(flipped.sum())} of {len(flipped)}", name,
        f"{float(off.n_off[place].double().mean()):.1f}",
        f"**{share(found.undone(off.winner_after[place]))}**", share(found.undone(off.winner_control[place])),
        share(found.no_longer(off.winner_after[place])), share(found.no_longer(off.winner_control[place])), f"{ratio:.2f}",
    ]  # fmt: skip


def cost_row(found: Found) -> list[str]:
    """What switching off costs where nothing is written."""
    costs = found.costs
    assert costs is not None
    n = len(found.clean)
    cells = []
    for place in range(len(costs.sets)):
        changed = (costs.winner_after[place] != costs.winner).double()
        real = costs.winner[n:] == found.number
        lost = int((costs.winner_after[place][n:][real] != found.number).sum())
        cells += [costs.sets[place], share(changed[:n]), f"{lost} of {int(real.sum())}"]
    return [str(found.block), found.word, *(cells if len(costs.sets) > 1 else [*["-"] * 3, *cells])]


def parts_row(found: Found) -> list[str]:
    """How much of the rise goes through latents, and how much through what the SAE leaves over."""
    off = found.off
    assert off is not None
    flipped = found.flipped
    number = found.number
    after, before = off.before[flipped][:, number], found.clean_cosine[flipped][:, number]
    latents, error = (after - found.parts[name][flipped][:, number] for name in ("latents_back", "error_back"))
    flagged = (after - off.after[-1][flipped][:, number]).mean()
    rise = (after - before).mean()
    return [
        str(found.block), found.word, f"{100 * rise:.2f}", f"{100 * latents.mean() / rise:.0f}%",
        f"{100 * error.mean() / rise:.0f}%", f"{100 * flagged / rise:.0f}%",
        share(found.undone(found.parts["latents_back"].argmax(dim=1))),
        share(found.undone(found.parts["error_back"].argmax(dim=1))),
    ]  # fmt: skip


def flag_row(found: Found, flag: cle.Flag) -> list[str]:
    """One flagged latent."""
    return [
        str(found.block), found.word, str(flag.latent), str(flag.label), f"{100 * flag.strength:.2f}",
        f"{flag.number('latent: t with the word'):.1f}", f"{flag.number('latent: t against another word'):.1f}",
        f"{flag.number('latent: t against an empty plate'):.1f}",
    ]  # fmt: skip


def figure(all_found: list[Found], path: Path) -> None:
    """Flips undone against the number of latents switched off, beside controls."""
    blocks = list(dict.fromkeys(found.block for found in all_found))
    fig = Figure(figsize=(3.8 * len(blocks) + 1.2, 3.6), layout="constrained")
    all_axes = fig.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    colours = dict(zip(WORDS, ("#1f6fb4", "#c2571a", "#2f8f4e"), strict=True))
    for axes, block in zip(all_axes, blocks, strict=True):
        for found in (found for found in all_found if found.block == block and found.off is not None):
            assert found.off is not None
            sizes = [len(found.off.latents[name]) for name in found.off.sets]
            for winner, style in ((found.off.winner_after, "-"), (found.off.winner_control, "--")):
                undone = found.undone(winner)
                values = undone.mean(dim=-1) if undone.dim() == 2 else undone.mean(dim=(1, 2))
                label = found.word if style == "-" else None
                axes.plot([0, *sizes], [0, *(100 * values).tolist()], style, color=colours[found.word], label=label,
                          marker="o", markersize=3, linewidth=1.6)  # fmt: skip
        axes.set_title(f"blocks.{block}.hook_resid_post", fontsize=10)
        axes.set_xlabel("latents switched off, greatest part of the rise first")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(-3, 103)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0].set_ylabel("flips undone, % of held-out photos")
    handles, labels = all_axes[0].get_legend_handles_labels()
    title = "solid: flagged\ndashed: random"
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, title=title, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def sheet(one: Study, found: Found, path: Path) -> None:
    """Held-out photos with the word, and what is predicted: without it, with it, and with the latents off."""
    assert found.off is not None
    fig = Figure(figsize=(14, 8), layout="constrained")
    all_axes = fig.subplots(3, N_SHOWN // 3).flatten()
    drawn = cle.draw_word(one.photos.bytes[one.held_out], found.word)
    labels = one.things.labels
    for axes in all_axes:
        axes.axis("off")
    for axes, place in zip(all_axes, found.flipped.nonzero().flatten().tolist(), strict=False):
        axes.imshow(drawn[place].permute(1, 2, 0).numpy())
        after = labels[int(found.off.winner_after[-1, place])]
        axes.set_title(f"{labels[int(found.clean[place])]} > {found.word} > {after}", fontsize=9)
    fig.suptitle(f"block {found.block}: without the word > with it > with {found.off.sets[-1]} latents off")
    fig.savefig(path, dpi=80)


def verdict(all_found: list[Found]) -> str:
    """In words, where flagged latents undo more than half of the flips, and the most that random ones undo."""

    def most(name: str | None) -> str:
        there = []
        for found in (found for found in all_found if found.off is not None):
            assert found.off is not None
            own = found.off.sets[-1] if name is None else name
            undone = (
                found.undone(found.off.winner_after[found.off.number(own)]) if own in found.off.sets else torch.zeros(0)
            )
            if float(undone.mean()) > 0.5:  # of nothing it is NaN, which is no more than half
                there.append(f"{found.word} at block {found.block} ({100 * float(undone.mean()):.0f}%)")
        return ", ".join(there) or "nowhere"

    random = max(
        float(found.undone(winner).mean())
        for found in all_found
        if found.off is not None
        for winner in found.off.winner_control
    )
    return (
        f"More than half of the flips are undone by the first three latents, the default: {most('3')}; by all that are flagged: "
        f"{most(None)}. Random latents undo at most {100 * random:.0f}% anywhere."
    )


def section(one: Study, all_found: list[Found], command: str) -> str:
    """The section of the page."""
    with_flags = [found for found in all_found if found.off is not None]
    none = [f"{found.word} at block {found.block}" for found in all_found if found.off is None]
    plain = all_found[0].clean
    effects = [
        row(found, name)
        for found in with_flags
        for name in found.off.sets  # type: ignore[union-attr]
    ]
    parts = [parts_row(found) for found in with_flags]
    costs = [cost_row(found) for found in with_flags]
    flagged = [flag_row(found, flag) for found in with_flags for flag in found.flags[:5]]
    return f"""
{command} ({machine()})

The words {", ".join(WORDS)} drawn with `draw_word` as it is (letters of a fifth of the height, dark on a light plate, at the bottom) on
{len(one.discovery) + len(plain)} of the {len(one.photos.paths)} COCO photos: those that neither are annotated with one of the three nor are taken for one. The
prediction is the greatest cosine with the 80 COCO names. Flags come from every second photo ({len(one.discovery)}), by `measure_interventions` with two
controls (another word of as many letters: {", ".join(WORDS.values())}; the plate without letters) and `flag_components` with its
defaults, but for the number of latents: {N_TRIED} are tried and every one that passes is flagged, where the default is the first 3. The
other {len(plain)} photos test them: `switch_off` sets the first 1, 2, 3, ... flagged latents to zero at every token, the SAE's error kept, and a
control sets as many random active latents to zero, each near in worth to one of the flagged ones ({N_CONTROLS} draws). Undone: back at what the photo is
taken for without the word, of the held-out photos that the word flips; no longer: at least not the word. SAEs of all tokens, 4,096
latents. In brackets the bootstrap interval of 95% over photos.

{verdict(all_found)}{f" No latent passes for {', '.join(none)}." if none else ""}

{table(["block", "word", "flipped", "latents off", "of them active in a photo", "undone", "undone, random", "no longer the word", "no longer, random", "worth of random / flagged"], effects)}

![flips undone](figures/real_flags.png)

Where the rise of the word's cosine goes, mean over the flipped held-out photos: through all latents together (put back to what they are
without the word), through the SAE's error (put back likewise), and what setting all flagged latents to zero takes away; and the flips
that are undone by the first two. They need not add up to 100%.

{table(["block", "word", "rise, points", "all latents", "error", "flagged, at zero", "undone by all latents", "undone by the error"], parts)}

What it costs where nothing is written: the held-out photos whose prediction changes, and the photos of the thing itself (COCO's annotation, and
ImageNet's classes {SAME_THING}) that are taken for it and no longer are.

{table(["block", "word", "latents off", "clean photos changed", "real ones lost", "latents off", "clean photos changed", "real ones lost"], costs)}

The first flagged latents. Label: the COCO name nearest to the decoder row. Rise: points of cosine that go when the latent alone is put
back, on the photos of discovery; t: paired, of the latent's activation.

{table(["block", "word", "latent", "label", "rise through it", "t with the word", "t against another word", "t against the empty plate"], flagged)}

The photos with their words and predictions are in `RUNS/flags/*.png`, which the command writes and the repository does not hold.
"""


def main() -> None:
    """Flag, switch off, print, and write the section `real_flags` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/real"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"), help="where weights, SAEs and results are kept")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS), help="earlier ones take longer")
    args = parser.parse_args()
    clip = real_tower(args.data, args.runs)
    one = study(clip, args.data, args.runs)
    saes = all_token_saes(clip, args.data, args.runs)
    all_found = [
        find(one, saes[f"blocks.{block}.hook_resid_post"], block, word) for block in args.blocks for word in WORDS
    ]
    for found in all_found:
        if found.off is not None:
            sheet(one, found, one.folder / f"{found.word}_{found.block}.png")
    figure(all_found, PAGE.parent / "figures" / "real_flags.png")
    blocks = " ".join(map(str, args.blocks))
    text = section(one, all_found, f"`make real`, that is `python -m benchmarks.real_flags --blocks {blocks}`")
    print(text)
    write_section("real_flags", text)


if __name__ == "__main__":
    main()
