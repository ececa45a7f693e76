"""Measurements of edits that were interrupted end as those that were not, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.resumed import same
from oracles.saes import build_sae
from tiny_clips import tiny_clip
from torch import Tensor

from clip_lens_ext.attribution import direction_target
from clip_lens_ext.errors import InputError
from clip_lens_ext.semantics import Intervention, InterventionEffects, measure_interventions
from clip_lens_ext.semantics.interventions_pass import EffectAccumulator, EffectRows
from clip_lens_ext.towers import HookedCLIP

HOOK = "blocks.0.hook_resid_post"
PROMPTS = ["a crane", "a big crane", "a duck"]


class Darker:
    """An edit that counts its calls, and may stop everything instead of one, as Ctrl-C would."""

    def __init__(self, factor: float) -> None:
        self.factor, self.n = factor, 0
        self.stops = False

    def __call__(self, pictures: Tensor) -> Tensor:
        if self.stops:
            raise KeyboardInterrupt
        self.n += 1
        return pictures * self.factor


FUNCTIONS = {name: Darker(factor) for name, factor in (("dim", 0.5), ("dark", 0.3), ("light", 1.2), ("control", 0.7))}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    for function in FUNCTIONS.values():
        function.n, function.stops = 0, False


def edits(pixels: Tensor) -> list[Intervention]:
    """Four edits of two and four and three pictures, with none, one or two controls."""
    neutral, other = pixels[:4], pixels[4:7]
    return [
        Intervention("flip", "overlay", neutral, neutral.flip(-1)),
        Intervention("dim", "text_drawn", neutral, FUNCTIONS["dim"], "crane", {"turn": neutral.flip(-2)}),
        Intervention("dark", "text_drawn", other, FUNCTIONS["dark"], "duck",
                     {"turn": other.flip(-2), "less": FUNCTIONS["control"]}),
        Intervention("light", "overlay", pixels[2:4], FUNCTIONS["light"]),
    ]  # fmt: skip


def measure(clip: HookedCLIP, sae: Any, given: Any, prompts: Any = None, **settings: Any) -> InterventionEffects:
    how = {"n_latents": 3, "batch_size": 2, "progress": False, **settings}
    return measure_interventions(clip, sae, PROMPTS if prompts is None else prompts, given, **how)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("at", FUNCTIONS)
def test_resumed_anywhere(clip: HookedCLIP, pixels: Tensor, sae: Any, tmp_path: Path, at: str, every: int) -> None:
    whole = measure(clip, sae, edits(pixels))
    assert len(set(whole.through_row.tolist())) == 4
    path = tmp_path / "effects"
    FUNCTIONS[at].stops = True
    with pytest.raises(KeyboardInterrupt):
        measure(clip, sae, edits(pixels), checkpoint=path, checkpoint_every=every)
    assert path.exists()
    FUNCTIONS[at].stops = False
    for function in FUNCTIONS.values():
        function.n = 0
    same(measure(clip, sae, edits(pixels), checkpoint=path, checkpoint_every=every), whole)
    # Edits that were measured are not made again; the one in which it stopped is.
    done = {"dim": set(), "dark": {"dim"}, "control": {"dim"}, "light": {"dim", "dark", "control"}}[at]
    assert {name for name, function in FUNCTIONS.items() if function.n == 0} == done
    for function in FUNCTIONS.values():
        function.stops = True
    same(measure(clip, sae, edits(pixels), checkpoint=path), whole)  # all of it is there
    assert torch.is_grad_enabled()


def test_stopped_twice_and_before_the_first(clip: HookedCLIP, pixels: Tensor, sae: Any, tmp_path: Path) -> None:
    whole, path = measure(clip, sae, edits(pixels)[1:]), tmp_path / "effects"
    for at in ("dim", "dark", "light"):
        FUNCTIONS[at].stops = True
        with pytest.raises(KeyboardInterrupt):
            measure(clip, sae, edits(pixels)[1:], checkpoint=path)
        assert path.exists() == (at != "dim")
        FUNCTIONS[at].stops = False
    same(measure(clip, sae, edits(pixels)[1:], checkpoint=path), whole)


def test_a_checkpoint_of_something_else_is_refused(clip: HookedCLIP, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "effects"
    sae = build_sae("topk", 48, HOOK, "patches", tower="vision", d_sae=37)
    FUNCTIONS["dark"].stops = True
    with pytest.raises(KeyboardInterrupt):
        measure(clip, sae, edits(pixels), checkpoint=path)
    FUNCTIONS["dark"].stops = False
    before = path.read_bytes()
    with torch.no_grad():
        vectors = clip.embed_texts(PROMPTS, normalize=True)
    for changed, message in (
        ({"n_prompts": 1}, "n_prompts was 2 and is now 1"),
        ({"n_latents": 4}, "n_latents was 3 and is now 4"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"hook_name": "blocks.1.hook_resid_post"}, f"hook_name was '{HOOK}' and is now 'blocks.1"),
        ({"token_scope": "cls"}, "token_scope was 'patches' and is now 'cls'"),
        ({"prompts": PROMPTS[:2]}, "prompts was .*; vectors was"),
        ({"prompts": direction_target(vectors.flip(0), labels=PROMPTS)}, r"settings: vectors was '\w+' and is now"),
    ):
        with pytest.raises(InputError, match=message):
            measure(clip, sae, edits(pixels), **{"checkpoint": path, **changed})

    def bright(pictures: Tensor) -> Tensor:
        return pictures + 1

    flip, dim, dark, light = edits(pixels)
    turned = pixels[:4].flip(-2)
    for other, message in (
        ([flip, dim, dark], r"edits was \['flip', 'dim', 'dark', 'light'\] and is now \['flip', 'dim', 'dark'\]"),
        ([dim, flip, dark, light], "edits was"),
        ([flip, dim, dark, Intervention("light", "overlay", pixels[3:5], light.after)],
         r"settings: pictures before of 'light' was '\w+' and is now '\w+';"),
        ([Intervention("flip", "overlay", pixels[:4], turned), dim, dark, light], "pictures after of 'flip' was"),
        ([Intervention("flip", "crop", pixels[:4], flip.after), dim, dark, light],
         "kind of 'flip' was 'overlay' and is now 'crop'"),
        ([flip, Intervention("dim", dim.kind, dim.before, dim.after, "duck", dim.controls), dark, light],
         "subject of 'dim' was 'crane' and is now 'duck'"),
        ([flip, Intervention("dim", dim.kind, dim.before, bright, "crane", dim.controls), dark, light],
         "pictures after of 'dim' was 'function Darker' and is now 'function .*bright'"),
        ([flip, Intervention("dim", dim.kind, dim.before, dim.after, "crane"), dark, light],
         r"control 'turn' of 'dim' was '\w+' and is now None; controls of 'dim' was \['turn'\] and is now \[\]"),
        ([flip, dim, Intervention("dark", dark.kind, dark.before, dark.after, "duck",
                                  dict(reversed(dark.controls.items()))), light], "controls of 'dark' was"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            measure(clip, sae, other, checkpoint=path)
    with pytest.raises(InputError, match="model_sha256 was"):
        measure(tiny_clip(seed=1), sae, edits(pixels), checkpoint=path)
    sae.cfg.k += 1  # the same weights
    with pytest.raises(InputError, match="sae_sha256 was"):
        measure(clip, sae, edits(pixels), checkpoint=path)
    sae.cfg.k -= 1
    assert path.read_bytes() == before
    same(measure(clip, sae, edits(pixels), checkpoint=path), measure(clip, sae, edits(pixels)))
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="no checkpoint"):
        measure(clip, sae, edits(pixels), checkpoint=path)


def test_accumulators_of_edits_are_one() -> None:
    def edit(name: str, n: int) -> EffectRows:
        """An edit of so many rows, with entries of its first one."""
        rows = torch.arange(n * 4.0).reshape(n, 4) + len(name)
        return EffectRows([name] * n, ["k"] * n, [""] * n, [f"{i}" for i in range(n)], torch.full((n,), n),
                          *(rows + i for i in range(8)), torch.zeros(n).long(), *[torch.arange(n)] * 4)  # fmt: skip

    parts = [edit("a", 1), edit("bb", 3), edit("ccc", 2)]
    whole, one, other = (EffectAccumulator() for _ in range(3))
    for own, given in ((whole, parts), (one, parts[:1]), (other, parts[1:])):
        for part in given:
            own.update(part)
    again = EffectAccumulator()
    again.load_state_dict(other.state_dict())
    assert one.merge(again).merge(EffectAccumulator()) is one
    found = one.result()
    for a, b in zip(found, whole.result(), strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert found.names == ["a", "bb", "bb", "bb", "ccc", "ccc"]
    assert found.through_row.tolist() == [0, 1, 1, 1, 4, 4]
    again.update(parts[0])
    assert again.result().through_row.tolist() == [0, 0, 0, 3, 3, 5]
