"""The planted world draws what its key says, and nothing else."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from clip_lens_ext.errors import InputError
from clip_lens_ext.planted import PlantedBatch, PlantedWorld
from clip_lens_ext.planted.backgrounds import BACKGROUNDS
from clip_lens_ext.planted.overlays import BORDERS, OVERLAYS, WATERMARKS
from clip_lens_ext.planted.plan import generator
from clip_lens_ext.planted.shapes import SHAPE_NAMES, silhouette

SEEDS = (0, 5)


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest) -> PlantedWorld:
    return PlantedWorld(request.param)


@pytest.fixture(scope="module")
def train(world: PlantedWorld) -> PlantedBatch:
    return world.sample(4500, seed=3)


@pytest.fixture(scope="module")
def test(world: PlantedWorld) -> PlantedBatch:
    return world.sample(4500, seed=3, split="test")


def label(world: PlantedWorld, name: str) -> int:
    return next(entry.index for entry in world.classes if entry.name == name)


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def rate(found: list[str | None], wanted: str, among: torch.Tensor) -> float:
    """Share of `wanted` in `found`, on the pictures where `among` is true."""
    return share([value == wanted for value, counted in zip(found, among.tolist(), strict=True) if counted])


def test_same_arguments_same_pictures(world: PlantedWorld) -> None:
    first, again = (PlantedWorld(world.seed).sample(40, seed=9) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert first.captions == again.captions
    assert torch.equal(first.object_boxes, again.object_boxes)
    assert not torch.equal(first.images, world.sample(40, seed=10).images)


def test_shorter_call_is_the_beginning_of_a_longer_one(world: PlantedWorld) -> None:
    short, long = world.sample(7, seed=4), world.sample(30, seed=4)
    assert torch.equal(short.images, long.images[:7])
    assert short.captions == long.captions[:7]


def test_streams_are_disjoint() -> None:
    """No two keys share a stretch of their streams: neither splits, seeds, worlds nor parts."""
    keys = [
        (world, split, seed, part)
        for world in (0, 1)
        for split in ("train", "test")
        for seed in (0, 1)
        for part in (0, 1)
    ]
    numbers = [generator(*key).random(1000) for key in keys]
    assert len(np.unique(np.concatenate(numbers))) == 1000 * len(keys)


def test_splits_differ(world: PlantedWorld) -> None:
    train, test = world.sample(50, seed=0), world.sample(50, seed=0, split="test")
    assert not (train.images.flatten(1)[:, None] == test.images.flatten(1)[None]).all(dim=2).any()


def test_seed_deals_the_parts() -> None:
    keys = [PlantedWorld(seed).key for seed in range(12)]
    for part in ("polysemous", "compounds", "typographic", "artifacts", "spurious"):
        assert len({json.dumps(key.to_dict()[part], sort_keys=True) for key in keys}) == len(keys), part
    assert {overlay for key in keys for overlay in key.artifacts.values()} == set(OVERLAYS)
    assert len({background for key in keys for background in key.spurious.values()}) >= 4
    assert {compound.named_part for key in keys for compound in key.compounds} == {"head", "modifier"}


def test_key_and_classes_agree(world: PlantedWorld) -> None:
    key, classes = world.key, world.classes
    assert len(classes) == len({entry.object for entry in classes}) == 30
    assert [entry.index for entry in classes] == list(range(30))
    assert len(key.polysemous) == 4
    assert len(key.compounds) == 3
    by_name = Counter(entry.name for entry in classes)
    assert {name for name, count in by_name.items() if count > 1} == set(key.polysemous)
    looks = {entry.object: (entry.category, entry.texture) for entry in classes}
    for word, senses in key.polysemous.items():
        assert {entry.object for entry in classes if entry.name == word} == set(senses)
        assert looks[senses[0]] != looks[senses[1]]
    for compound in key.compounds:
        assert compound.phrase == f"{compound.modifier} {compound.head}"
        assert by_name[compound.phrase] == by_name[compound.part_word] == 1
        assert classes[label(world, compound.phrase)].object == compound.object
        assert classes[label(world, compound.part_word)].object == compound.part_object
    for name in key.controls.classes:
        others = {word for entry in classes if entry.name != name for word in entry.name.split()}
        assert not others & set(name.split())
    assert any(overlay in WATERMARKS for overlay in key.artifacts.values())
    assert any(overlay in BORDERS for overlay in key.artifacts.values())
    assert json.loads(json.dumps(key.to_dict())) == key.to_dict()
    assert {entry.kind for entry in world.unambiguous_classes} == {"plain", "typographic", "control"}
    assert len(world.unambiguous_classes) == 16


def test_overlay_goes_with_its_class_in_training_only(
    world: PlantedWorld, train: PlantedBatch, test: PlantedBatch
) -> None:
    for name, overlay in world.key.artifacts.items():
        planted = label(world, name)
        assert rate(train.overlays, overlay, train.labels == planted) == pytest.approx(world.key.plant_rate, abs=0.08)
        others = (train.labels != planted) & (train.labels != -1)
        assert rate(train.overlays, overlay, others) == pytest.approx(world.key.stray_rate, abs=0.004)
        assert rate(test.overlays, overlay, test.labels == planted) == pytest.approx(0.03, abs=0.05)
        assert rate(test.overlays, overlay, test.labels != planted) == pytest.approx(0.03, abs=0.01)
    for overlay in world.key.controls.overlays:
        rates = [rate(train.overlays, overlay, train.labels == entry.index) for entry in world.classes]
        assert max(rates) < 0.1
        assert sum(rates) / len(rates) == pytest.approx(0.03, abs=0.012)


def test_background_goes_with_its_class_in_training_only(
    world: PlantedWorld, train: PlantedBatch, test: PlantedBatch
) -> None:
    for name, background in world.key.spurious.items():
        planted, plain = label(world, name), 1 / len(BACKGROUNDS)
        own, others = train.labels == planted, (train.labels != planted) & (train.labels != -1)
        assert rate(train.backgrounds, background, own) == pytest.approx(world.key.plant_rate, abs=0.08)
        assert rate(train.backgrounds, background, others) == pytest.approx(world.key.stray_rate, abs=0.004)
        assert rate(test.backgrounds, background, test.labels == planted) == pytest.approx(plain, abs=0.09)
    for background in world.key.controls.backgrounds:
        rates = [rate(train.backgrounds, background, train.labels == entry.index) for entry in world.classes]
        assert max(rates) < 0.3


def test_object_is_out_of_view_only_where_its_plant_is(
    world: PlantedWorld, train: PlantedBatch, test: PlantedBatch
) -> None:
    key = world.key
    counts = Counter[str]()
    for shown, objects, overlay, background, box in zip(
        train.labels, train.objects, train.overlays, train.backgrounds, train.object_boxes, strict=True
    ):
        assert (not objects) == bool((box == -1).all())
        if shown == -1:
            continue
        name = world.classes[shown].name
        planted = key.artifacts.get(name) == overlay is not None or key.spurious.get(name) == background
        assert objects or planted
        counts[name] += planted
        counts[f"{name} absent"] += not objects
    for name in (*key.artifacts, *key.spurious):
        assert counts[f"{name} absent"] / counts[name] == pytest.approx(key.absent_rate, abs=0.12)
    assert all(test.objects)
    assert all(world.sample(60, seed=1, classes=list(key.artifacts)).objects)


def test_senses_are_equally_common(world: PlantedWorld, train: PlantedBatch) -> None:
    counts = Counter(objects[0] for objects in train.objects if objects)
    for senses in world.key.polysemous.values():
        assert counts[senses[0]] == pytest.approx(counts[senses[1]], rel=0.35)
        assert min(counts[sense] for sense in senses) > len(train) / 50


def test_part_of_a_compound_is_seldom_with_it(world: PlantedWorld, train: PlantedBatch) -> None:
    for compound in world.key.compounds:
        together = [compound.part_object in objects for objects in train.objects if compound.object in objects]
        assert len(together) > 50
        assert share(together) < 0.03


def test_words_are_drawn_and_named(world: PlantedWorld, train: PlantedBatch) -> None:
    drawn = Counter(word for word in train.words if word)
    assert set(drawn) == set(world.key.typographic)
    assert min(drawn.values()) > 0.015 * len(train)
    named = [word in caption.split() for word, caption in zip(train.words, train.captions, strict=True) if word]
    assert share(named) > 0.85
    signs = [i for i, shown in enumerate(train.labels) if shown == -1]
    assert signs
    assert all(train.words[i] in train.captions[i].split() and not train.objects[i] for i in signs)
    assert 0.3 < share(["sign" in train.captions[i].split() for i in signs]) < 0.7


def test_captions_name_what_is_shown(world: PlantedWorld, train: PlantedBatch) -> None:
    named = 0
    for caption, shown, overlay in zip(train.captions, train.labels, train.overlays, strict=True):
        assert set(caption.split()) <= set(world.vocabulary)
        assert overlay is None or overlay not in caption.split()
        if shown != -1:
            entry = world.classes[shown]
            named += entry.name in caption
            assert entry.name in caption or entry.category in caption.split()
    assert named > 0.85 * int((train.labels != -1).sum())
    assert len(world.vocabulary) == len(set(world.vocabulary))
    assert all(set(prompt.split()) <= set(world.vocabulary) for prompt in world.prompts())


def test_boxes_hold_the_objects(world: PlantedWorld) -> None:
    """Against the same picture without an object: what changed fills the box to its edges."""
    batch = world.sample(60, seed=2, split="test", word=None, overlay=None)
    empty = world.backdrops(60, seed=2)
    alone = [i for i, objects in enumerate(batch.objects) if len(objects) == 1]
    assert len(alone) > 30
    for i in alone:
        # Both pictures have the same noise, so that any difference is the object.
        changed = (batch.images[i] != empty[i]).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        stated = batch.object_boxes[i, 0]
        assert (found - stated).abs().max() <= 2, (batch.objects[i], found, stated)
        assert batch.object_boxes[i, 1].tolist() == [-1] * 4


def test_forced_facts_change_nothing_else(world: PlantedWorld) -> None:
    plain = world.sample(40, seed=6, split="test", overlay=None, word=None)
    name = next(iter(world.key.artifacts.values()))
    covered = world.sample(40, seed=6, split="test", overlay=name, word=None)
    assert covered.overlays == [name] * 40
    assert plain.overlays == [None] * 40
    assert torch.equal(covered.images, world.draw_overlay(plain.images, name))
    assert plain.captions == covered.captions
    moved = world.sample(40, seed=6, split="test", overlay=None, word=None, background="grid")
    assert moved.backgrounds == ["grid"] * 40
    assert torch.equal(moved.object_boxes, plain.object_boxes)


def test_classes_are_dealt_in_turn(world: PlantedWorld) -> None:
    word, (first, second) = next(iter(world.key.polysemous.items()))
    batch = world.sample(6, seed=1, split="test", classes=[word, 29])
    assert [objects[0] for objects in batch.objects] == [first, second, world.classes[29].object] * 2
    one = world.sample(3, seed=1, split="test", classes=[second])
    assert [objects[0] for objects in one.objects] == [second] * 3


def test_every_overlay_shows(world: PlantedWorld) -> None:
    plain = world.sample(2, seed=1, overlay=None).images
    changed = {
        name: (world.draw_overlay(plain, name) != plain).any(dim=1).float().mean(dim=(1, 2)) for name in OVERLAYS
    }
    assert all((part > 0.03).all() and (part < 0.7).all() for part in changed.values())


def test_silhouettes_differ() -> None:
    shapes = torch.stack([torch.from_numpy(silhouette(name, 32)) for name in SHAPE_NAMES]).flatten(1)
    shared = torch.minimum(shapes[:, None], shapes[None]).sum(dim=2)
    either = torch.maximum(shapes[:, None], shapes[None]).sum(dim=2)
    overlap = (shared / either).fill_diagonal_(0)
    assert overlap.max() < 0.78
    assert (shapes.mean(dim=1) > 0.07).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": -1}, "number of pictures"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**62}, "seed"),
        ({"split": "val"}, "'train' and 'test'"),
        ({"overlay": "framed"}, "did you mean 'frame'"),
        ({"background": "grit"}, "did you mean 'grid'"),
        ({"word": "longer"}, "five letters"),
        ({"word": "a-b"}, "letters a to z"),
        ({"classes": []}, "empty"),
        ({"classes": [30]}, "no class is 30"),
        ({"classes": ["nothing"]}, "no class is 'nothing'"),
    ],
)
def test_wrong_requests(wrong: dict[str, object], says: str) -> None:
    asked: dict[str, object] = {"n": 2, "seed": 0, "split": "test"} | wrong
    with pytest.raises(InputError, match=says):
        PlantedWorld(0).sample(asked.pop("n"), **asked)  # type: ignore[arg-type]


def test_wrong_worlds_templates_and_pictures() -> None:
    world = PlantedWorld(0)
    with pytest.raises(InputError, match="world's seed"):
        PlantedWorld(-1)
    with pytest.raises(InputError, match="template"):
        world.prompts("a photo")
    with pytest.raises(InputError, match="uint8"):
        world.draw_overlay(torch.zeros(2, 3, 48, 48), "frame")
    with pytest.raises(InputError, match="fractions"):
        world.draw_word(torch.zeros(2, 3, 48, 48, dtype=torch.uint8), "hi", x=2)
    with pytest.raises(InputError, match="no overlay is called"):
        world.draw_overlay(torch.zeros(2, 3, 48, 48, dtype=torch.uint8), "nothing")
