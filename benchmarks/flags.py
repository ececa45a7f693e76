"""Flags against the answer key of planted worlds: `python -m benchmarks.flags --seeds 0 --runs runs/flags`.

For each seed: train the world's CLIP and SAEs where they are not there yet, flag its prompts by public calls that see
no key, and only then compare with the key. What is done for a seed is kept in its JSON file, so a run can be stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

import clip_lens_ext as cle
from benchmarks.page import table, write_section
from benchmarks.timing import machine
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.load import WEIGHTS, preprocess
from clip_lens_ext.planted.overlays import OVERLAYS
from clip_lens_ext.planted.store import MANIFEST, read_clip

HOOK = "blocks.2.hook_resid_post"
TEMPLATE = "a photo of a {}"
KINDS = ("polysemous", "compound noun", "typographic", "artifact")
FUNCTION_WORDS = frozenset(["a", "photo", "of", "picture", "drawing", "and", "on", "with", "the", "word", "sign"])
N_PICTURES, N_OF_PROMPT, N_EDITED, N_WRITTEN, N_PROBE = 4800, 120, 48, 32, 1500
DEVELOPED_ON = (0, 101, 102)
REVIEWED = (
    "103 was measured once with earlier rules, and not looked into. The totals of 103 to 106 had been seen (precision of typographic flags 0.83, 1, 1 and "
    "0.71) when a word that no masked picture has lost its flag, by the rule's definition and a false flag on 102; nothing else of these worlds was looked at."
)
ABOUT = 0.75  # AUROC from which a latent counts as being about something
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, eq=False)
class Trained:
    """A world's CLIP and SAE."""

    world: PlantedWorld
    clip: cle.HookedCLIP
    sae: Any


def trained(seed: int, runs: Path) -> Trained:
    """The CLIP and the SAE of a world; seed 0 ships, others are trained by the one command."""
    folder = WEIGHTS if seed == 0 else runs / f"weights_{seed}"
    if not (folder / MANIFEST).exists():
        command = [sys.executable, "-m", "clip_lens_ext.planted.train", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True)
    world = PlantedWorld(seed)
    native, tokenizer, _ = read_clip(folder / "clip.safetensors", vocabulary=world.vocabulary)
    clip = cle.HookedCLIP(native, preprocess=preprocess, tokenizer=tokenizer, model_name=f"planted-{seed}").eval()
    return Trained(world, clip, cle.load_sae(folder / "saes" / "vision" / HOOK))


# What a user does: pictures, prompts and edits; nothing below this line, up to the next one, reads world.key.


def edits_of_pictures(world: PlantedWorld) -> list[cle.Intervention]:
    """Every overlay and every background that this world can draw, on pictures of everything."""
    drawn = world.sample(N_EDITED, seed=31, split="test", overlay=None, word=None).images
    plain = normalise(drawn)
    found = [cle.Intervention(f"overlay {name}", "overlay", plain, normalise(world.draw_overlay(drawn, name)), name)
             for name in OVERLAYS]  # fmt: skip
    for name in BACKGROUNDS:
        swapped = world.sample(N_EDITED, seed=31, split="test", overlay=None, word=None, background=name).images
        found.append(cle.Intervention(f"background {name}", "background", plain, normalise(swapped), name))
    return found


def empty_plate(before: Tensor, written: Tensor) -> Tensor:
    """The pictures with the plate of a word, and no letters on it: the colour of the plate's corner everywhere."""
    changed = (before != written).any(dim=1).any(dim=0).nonzero()
    (top, left), (bottom, right) = changed.amin(dim=0).tolist(), (changed.amax(dim=0) + 1).tolist()
    plate = before.clone()
    plate[:, :, top:bottom, left:right] = written[:, :, top, left][:, :, None, None]
    return plate


def edits_of_text(world: PlantedWorld, words: list[str]) -> list[cle.Intervention]:
    """Each word drawn on empty backgrounds, and masked on the pictures that have it."""
    empty = world.backdrops(N_WRITTEN, seed=32)
    neutral = normalise(empty)
    rng = random.Random(33)
    found = []
    for word in words:
        # Another one on each picture: a single one may happen to look like the word, or like that of another prompt.
        others = ["".join(rng.choice(LETTERS) for _ in word) for _ in empty]
        written = world.draw_word(empty, word)
        another = torch.cat([world.draw_word(one[None], other) for one, other in zip(empty, others, strict=True)])
        controls = {"another word": normalise(another),
                    "an empty plate": normalise(empty_plate(empty, written))}  # fmt: skip
        found.append(cle.Intervention(f"draw {word}", "text_drawn", neutral, normalise(written), word, controls))
    # Where text is on a picture, and which, is what a text detector says; here the world says it.
    batch = world.sample(1200, seed=34)
    for word in words:
        shown = torch.tensor([one == word for one in batch.words])
        if int(shown.sum()) >= 10:
            before = batch.images[shown][:N_WRITTEN]
            after = cle.mask_boxes(before, batch.word_boxes[shown][:N_WRITTEN])
            found.append(cle.Intervention(f"mask {word}", "text_masked", normalise(before), normalise(after), word))
    return found


def flags_of(trained_: Trained) -> cle.Flags:
    """The pipeline as a user runs it."""
    world, clip, sae = trained_.world, trained_.clip, trained_.sae
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    pictures = normalise(world.sample(N_PICTURES, seed=30, split="test").images)
    senses = cle.find_picture_senses(clip, pictures, sae, names, template=TEMPLATE, n=N_OF_PROMPT)
    target = cle.text_target(clip, senses.prompts)
    attributions = cle.aggregate_attributions(
        clip.vision, pictures[senses.sample.flatten()], sae, target,
        target_of=torch.arange(len(target)).repeat_interleave(N_OF_PROMPT),
    )  # fmt: skip
    references = cle.collect_references(clip.vision, pictures, sae)
    embeddings = cle.embed_references(references, pictures, clip)
    terms = [word for word in world.vocabulary if word not in FUNCTION_WORDS]
    vocabulary = cle.Vocabulary.from_terms(dict.fromkeys([*names, *terms]), templates=TEMPLATE)
    words = [word for word in dict.fromkeys(" ".join(names).split()) if len(word) <= 5]
    effects = cle.measure_interventions(
        clip, sae, senses.prompts[: len(names)], [*edits_of_pictures(world), *edits_of_text(world, words)],
        n_prompts=1, batch_size=N_EDITED,
    )  # fmt: skip
    return cle.flag_components(
        attributions, cle.align(embeddings, vocabulary, clip), references, target=target, senses=senses,
        interventions=effects, embeddings=embeddings,
    )  # fmt: skip


# The comparison with the key.


def planted(world: PlantedWorld) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kind -> name -> what is planted on it: objects of other senses, a part's object, a word, an overlay, a background."""
    key = world.key
    return {
        "polysemous": dict(key.polysemous),
        "compound noun": {compound.phrase: (compound.part_object,) for compound in key.compounds},
        "typographic": {name: (name,) for name in key.typographic},
        "artifact": {name: (what,) for name, what in {**key.artifacts, **key.spurious}.items()},
    }


def auroc_of(trained_: Trained) -> dict[str, Tensor]:
    """For everything that is planted, how well each latent tells pictures with it from pictures without, `[d_sae]`."""
    world = trained_.world
    batch = world.sample(N_PROBE, seed=40, split="test")
    active = activations(trained_, batch.images)
    found = {}
    for kind, of_kind in planted(world).items():
        for what in {one for several in of_kind.values() for one in several}:
            if kind == "typographic":
                here = activations(trained_, world.draw_word(world.backdrops(200, seed=41), what))
                away = active[torch.tensor([one is None for one in batch.words])]
                found[f"{kind} {what}"] = auroc(
                    torch.cat([here, away]), torch.arange(len(here) + len(away)) < len(here)
                )
                continue
            shown = [what in objects or what in (overlay, background) for objects, overlay, background
                     in zip(batch.objects, batch.overlays, batch.backgrounds, strict=True)]  # fmt: skip
            found[f"{kind} {what}"] = auroc(active, torch.tensor(shown))
    return found


def learned(trained_: Trained) -> dict[str, dict[str, float]]:
    """Kind -> name -> how well the cosines show that the *model* does what was planted; 0.5 is chance.

    Of a word the AUROC of its prompt with the word drawn on neutral pictures, beside other words; of a polysemous name
    that of its objects, each beside pictures of all else, and the worse of them; of a compound that of the part's word
    and its object. Of an artifact, on pictures of all else before and after, the share of other prompts that rise less
    than its own: an overlay moves a picture less than what it shows, so the same picture is compared.
    """
    world, clip = trained_.world, trained_.clip
    names = list(dict.fromkeys(entry.name for entry in world.classes))
    prompts = clip.embed_texts([TEMPLATE.format(name) for name in names], normalize=True).detach()
    batch = world.sample(N_PROBE, seed=42, split="test", overlay=None, word=None)
    pictures = predictions(trained_, batch.images)
    found: dict[str, dict[str, float]] = {}
    for kind, of_kind in planted(world).items():
        for name, things in of_kind.items():
            if kind == "typographic":
                neutral, rng = world.backdrops(200, seed=41), random.Random(43)
                other = ["".join(rng.choice(LETTERS) for _ in name) for _ in neutral]
                before = torch.cat([world.draw_word(one[None], word) for one, word in zip(neutral, other, strict=True)])
                after = world.draw_word(neutral, name)
            elif kind == "artifact":
                own = {entry.object for entry in world.classes if entry.name == name}
                rest = torch.tensor([not own & set(objects) for objects in batch.objects])
                swapped = {"background": things[0]} if things[0] in BACKGROUNDS else {"overlay": things[0]}
                edited = world.sample(N_PROBE, seed=42, split="test", **{"overlay": None, "word": None, **swapped})
                rest &= (edited.images != batch.images).flatten(1).any(dim=1)
                rise = (predictions(trained_, edited.images[rest]) - pictures[rest]) @ prompts.T
                less = (rise < rise[:, names.index(name), None]).double().sum(dim=1) / (len(names) - 1)
                found.setdefault(kind, {})[name] = float(less.mean())
                continue
            else:
                word = name if kind == "polysemous" else next(
                    compound.part_word for compound in world.key.compounds if compound.phrase == name
                )  # fmt: skip
                vector = clip.embed_texts(TEMPLATE.format(word), normalize=True).detach()
                shown = [torch.tensor([thing in objects for objects in batch.objects]) for thing in things]
                value = pictures @ vector.T
                areas = []
                for own_thing, others in zip(shown, (torch.stack(shown).any(0) & ~one for one in shown), strict=True):
                    areas.append(float(auroc(value[~others], own_thing[~others])))
                found.setdefault(kind, {})[name] = min(areas)
                continue
            vector = clip.embed_texts(TEMPLATE.format(name), normalize=True).detach()
            value = torch.cat([predictions(trained_, after), predictions(trained_, before)]) @ vector.T
            found.setdefault(kind, {})[name] = float(auroc(value, torch.arange(len(value)) < len(after)))
    return found


@torch.no_grad()
def predictions(trained_: Trained, images: Tensor) -> Tensor:
    """Embeddings of unit length, `[picture d_embed]`."""
    return torch.cat([trained_.clip.embed_images(some, normalize=True) for some in normalise(images).split(200)])


def activations(trained_: Trained, images: Tensor) -> Tensor:
    """Greatest activation over the tokens, `[picture d_sae]`."""
    found = []
    for some in normalise(images).split(100):
        found.append(cle.encode(trained_.clip.vision, some, trained_.sae).dense().amax(dim=1))
    return torch.cat(found)


def auroc(value: Tensor, shown: Tensor) -> Tensor:
    """Area under the curve of each column, `[column]`: 0.5 is chance."""
    n = int(shown.sum())
    rank = torch.from_numpy(rankdata(value.numpy(), axis=0))
    return (rank[shown].sum(dim=0) - n * (n + 1) / 2) / (n * (len(shown) - n))


def scored(trained_: Trained, flags: cle.Flags) -> dict[str, Any]:
    """What was hit, what was flagged without a reason, and what could be found at all."""
    world, about, by_model = trained_.world, auroc_of(trained_), learned(trained_)
    found: dict[str, Any] = {}
    for kind, of_kind in planted(world).items():
        flagged: dict[str, list[dict[str, Any]]] = {}
        for flag in flags.of(kind):
            name = flag.prompt.removeprefix(TEMPLATE.removesuffix("{}"))
            things = of_kind.get(name, ())
            areas = {what: float(about[f"{kind} {what}"][flag.latent]) for what in things}
            entry = {"latent": flag.latent, "label": flag.label, "subject": flag.subject, "strength": flag.strength,
                     "share": flag.share, "auroc": areas, "right_subject": is_right(world, kind, name, flag.subject)}  # fmt: skip
            flagged.setdefault(name, []).append(entry)
        hits = [name for name, entries in flagged.items() if is_hit(entries)]
        both = [name for name in hits if all(is_hit(flagged[name], what) for what in of_kind[name])]
        best = {name: min(float(about[f"{kind} {what}"].max()) for what in things) for name, things in of_kind.items()}
        found[kind] = {"flagged": flagged, "hits": hits, "all_things": both, "planted": sorted(of_kind), "best_latent": best,
                       "model": by_model[kind],
                       "learned": sorted(name for name in of_kind if by_model[kind][name] >= ABOUT),
                       "findable": sorted(name for name, area in best.items()
                                          if area >= ABOUT and by_model[kind][name] >= ABOUT)}  # fmt: skip
    return found


def is_right(world: PlantedWorld, kind: str, name: str, subject: str) -> bool:
    """Whether a flag's subject is what the key has: the part's word, the drawn word, the overlay or the background."""
    if kind == "polysemous":
        return True  # it has no subject but the prompt
    if kind == "compound noun":
        return any(one.phrase == name and one.part_word == subject for one in world.key.compounds)
    return subject in planted(world)[kind].get(name, ())


def is_hit(entries: list[dict[str, Any]], what: str | None = None) -> bool:
    """Whether some flagged latent, with the right subject, is about something that is planted, or about this very thing."""
    return any(
        one["right_subject"] and any(area >= ABOUT for thing, area in one["auroc"].items() if what in (None, thing))
        for one in entries
    )


def rates(entry: dict[str, Any]) -> tuple[float, ...]:
    """Precision of prompts and with a latent, and recall of planted, learned, findable; NaN for nothing to divide by."""
    hits, flagged = set(entry["hits"]), entry["flagged"]
    right = [name for name, found in flagged.items()
             if name in entry["planted"] and any(one["right_subject"] for one in found)]  # fmt: skip
    recalls = [len(hits & set(entry[of])) / len(entry[of]) if entry[of] else math.nan
               for of in ("planted", "learned", "findable")]  # fmt: skip
    precisions = [len(names) / len(flagged) if flagged else math.nan for names in (right, hits)]
    return (*precisions, *recalls)


def section(results: dict[int, dict[str, Any]]) -> str:
    """The section of the page: a table of seeds and kinds, and what was missed."""
    rows = []
    for kind in KINDS:
        by_seed = {seed: rates(result[kind]) for seed, result in results.items()}
        for seed, found in by_seed.items():
            entry = results[seed][kind]
            missed = ", ".join(sorted(set(entry["planted"]) - set(entry["hits"]))) or "none"
            wrong = ", ".join(sorted(set(entry["flagged"]) - set(entry["hits"]))) or "none"
            not_learned = [f"{name} ({entry['model'][name]:.2f})" for name in entry["planted"] if name not in entry["learned"]]
            no_latent = [f"{name} ({entry['best_latent'][name]:.2f})" for name in entry["learned"] if name not in entry["findable"]]
            rows.append([kind, str(seed), *("-" if math.isnan(value) else f"{value:.2f}" for value in found),
                         ", ".join(not_learned) or "none", ", ".join(no_latent) or "none", missed, wrong])  # fmt: skip
        numbers = [[value for value in values if not math.isnan(value)] for values in zip(*by_seed.values(), strict=True)]
        means = [f"**{mean(values):.2f}**" + f" of {len(values)}" * (len(values) < len(results)) if values else "-"
                 for values in numbers]  # fmt: skip
        rows.append([f"**{kind}**", "mean", *means, "", "", "", ""])
    header = ["kind", "seed", "precision of prompts", "with a latent about it", "recall of planted", "of learned", "of findable", "not learned by the model", "no latent",
              "missed", "flagged in error"]  # fmt: skip
    seeds = " ".join(map(str, results))
    hits, all_things = (sum(len(result["polysemous"][what]) for result in results.values()) for what in ("hits", "all_things"))
    both = f"{all_things} of {hits}"
    return "\n\n".join(
        [
            f"`python -m benchmarks.flags --seeds {seeds}` ({machine()})",
            f"A flag counts for a prompt and kind, and hits where the key has it planted (an artifact with that very overlay or "
            f"background, a compound with that very word) and a flagged latent is about what is planted: AUROC of at least {ABOUT} on pictures with and without it. Every "
            "other prompt is a negative: plain classes, and the controls, words and phrases with nothing planted. *Precision "
            "of prompts* asks of a flag that its prompt and its subject are planted; *with a latent about it* asks for the "
            "latent too, so that a prompt whose flagged latents are all about less counts as flagged in error. What is planted in the pictures need "
            f"not be learned: *learned* is what moves the model's own prediction with that AUROC (of an artifact: more than that share of the other "
            "prompts, on the same pictures without and with it), by an oracle with the key; *findable* is of it "
            f"what the SAE's best single latent tells with that AUROC. Of a polysemous name, findable asks for a latent of each of its objects; {both} "
            f"hits have flagged latents of both. The worlds {', '.join(map(str, DEVELOPED_ON))} were looked at while the rules were made; {REVIEWED} {N_PICTURES} test pictures, {N_OF_PROMPT} of each prompt, SAE at `{HOOK}`.",
            table(header, rows),
        ]
    )


def main() -> None:
    """Flag, compare, print, and write the section `flags` of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="worlds (default: the one that ships)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/flags"), help="weights of other worlds, and the JSON of each seed"
    )
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in args.seeds:
        path = args.runs / f"flags_{seed}.json"
        if not path.exists() or json.loads(path.read_text()).get("rules") != rules():
            one = trained(seed, args.runs)
            flags = flags_of(one)
            flags.save(args.runs / f"flags_{seed}.safetensors")
            path.write_text(json.dumps({"rules": rules(), **scored(one, flags)}, indent=1))
        results[seed] = json.loads(path.read_text())
    text = section(results)
    print(text)
    seen = sorted(set(args.seeds) & set(DEVELOPED_ON))
    if seen:
        print(f"docs/results.md stays as it is: the rules were made on seed {', '.join(map(str, seen))}")
    else:
        write_section("flags", text)


def rules() -> str:
    """Hash of the code that flags and scores: what other code found is not shown as this one's."""
    package = Path(cle.__file__).parent
    files = [Path(__file__), *sorted((package / "semantics").glob("*.py")), *sorted((package / "attribution").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


if __name__ == "__main__":
    main()
