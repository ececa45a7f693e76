"""Edits of pictures: paired differences against loops, controls, the way through latents, text drawn and masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import flags as oracle
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.attribution import direction_target
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.saes import encode
from clip_lens_ext.semantics import (
    Intervention,
    InterventionEffects,
    draw_word,
    mask_boxes,
    measure_interventions,
)
from clip_lens_ext.towers import HookedCLIP

PROMPTS = ["a crane", "a big crane", "a duck"]
TIGHT = {"rtol": 1e-9, "atol": 1e-12}  # float64 throughout; predictions are of order 0.1


def darker(pictures: Tensor) -> Tensor:
    return pictures * 0.5


def edits(pixels: Tensor) -> list[Intervention]:
    shifted, flipped = pixels[:5] + torch.linspace(0, 1, 32, dtype=pixels.dtype), pixels[:5].flip(-1)
    return [
        Intervention("shift", "overlay", pixels[:5], shifted),
        Intervention("draw", "text_drawn", pixels[:5], darker, "crane", {"flip": flipped, "dim": darker}),
    ]


@pytest.fixture(scope="module")
def effects(clip: HookedCLIP, pixels: Tensor, sae: Any) -> InterventionEffects:
    return measure_interventions(clip, sae, PROMPTS, edits(pixels), n_latents=3, batch_size=2, progress=False)


def seen(clip: HookedCLIP, sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture alone, by the native model."""
    with torch.no_grad():
        text = F.normalize(clip.native.encode_text(clip.tokenize(PROMPTS)), dim=-1)
        image = torch.cat([F.normalize(clip.native.encode_image(one[None]), dim=-1) for one in x])
        latent = torch.cat([encode(clip.vision, one[None], sae).dense().amax(1).clamp(min=0) for one in x])
    return latent, image @ text.T


def test_changes_are_means_of_paired_differences(
    clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects
) -> None:
    shift, draw = edits(pixels)
    after = darker(pixels[:5])
    pairs = {
        ("shift", "untouched"): (pixels[:5], shift.after),
        ("draw", "untouched"): (pixels[:5], after),
        ("draw", "flip"): (draw.controls["flip"], after),
        ("draw", "dim"): (after, after),
    }
    assert list(zip(effects.names, effects.against, strict=True)) == list(pairs)
    for (name, against), (first, second) in pairs.items():
        row = effects.row(name, against)
        before, now = seen(clip, sae, first), seen(clip, sae, second)
        for what, old, new in zip(("latent", "prediction"), before, now, strict=True):
            for column in range(0, old.shape[1], 5 if what == "latent" else 1):
                change, error = oracle.paired(old[:, column].tolist(), new[:, column].tolist())
                found = [getattr(effects, f"{what}_{part}")[row, column].item()
                         for part in ("change", "error", "before", "after")]  # fmt: skip
                expected = [change, error, old[:, column].mean().item(), new[:, column].mean().item()]
                torch.testing.assert_close(found, expected, **TIGHT)


def test_the_control_that_is_the_edit_leaves_nothing(effects: InterventionEffects) -> None:
    row = effects.row("draw", "dim")
    assert effects.prediction_change[row].abs().max() == 0
    assert effects.prediction_t[row].abs().max() == effects.latent_t[row].abs().max() == 0


def test_the_way_through_a_latent_is_what_putting_it_back_takes_away(
    clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects
) -> None:
    row = effects.row("draw")
    checked = 0
    with torch.no_grad():
        text = F.normalize(clip.native.encode_text(clip.tokenize(PROMPTS)), dim=-1)
        hook = sae.cfg.metadata.hook_name
        for prompt in PROMPTS:
            for latent, (part, error) in effects.through(row, prompt).items():
                differences = []
                for one in pixels[:5]:
                    old = encode(clip.vision, one[None], sae).dense()[0, :, latent]
                    new = encode(clip.vision, darker(one[None]), sae).dense()[0, :, latent]
                    activation = clip.vision.run_to(darker(one[None]), hook).clone()
                    plain = clip.vision.run_from(hook, activation)
                    activation[0, 1:] += (old - new)[:, None] * sae.W_dec[latent]
                    edited = clip.vision.run_from(hook, activation)
                    y = [F.normalize(e, dim=-1)[0] @ text[PROMPTS.index(prompt)] for e in (plain, edited)]
                    differences.append(float(y[0] - y[1]))
                expected = oracle.paired([0.0] * 5, differences)
                # Decoding all latents and the difference of two decodings round differently.
                torch.testing.assert_close((part, error), expected, rtol=1e-6, atol=1e-10)
                checked += 1
    assert checked >= 6


def test_prompts_that_hold_the_subject_come_first(effects: InterventionEffects) -> None:
    row = effects.row("draw")
    assert set(effects.through_prompt[effects.through_row == row].tolist()) == {0, 1, 2}  # and one that does not
    parts = [part for part, _ in effects.through(row, "a crane").values()]
    assert parts == sorted(parts, reverse=True)


def test_prompts_that_hold_the_subject_take_no_place_of_others(
    clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects
) -> None:
    found = measure_interventions(clip, sae, PROMPTS, edits(pixels)[1], n_prompts=1, n_latents=3, progress=False)
    assert set(found.through_prompt.tolist()) == {0, 1, 2}
    alone = measure_interventions(clip, sae, PROMPTS, edits(pixels)[0], n_prompts=1, n_latents=3, progress=False)
    assert set(alone.through_prompt.tolist()) == {int(alone.prediction_change[0].argmax())}
    for wrong in ({"n_prompts": 0}, {"n_latents": -1}):
        with pytest.raises(InputError, match="at least 1"):
            measure_interventions(clip, sae, PROMPTS, edits(pixels), progress=False, **wrong)  # type: ignore[arg-type]


def test_an_edit_that_changes_nothing(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    same = Intervention("same", "overlay", pixels[:3], pixels[:3].clone())
    found = measure_interventions(clip, sae, PROMPTS, same, progress=False)
    assert found.prediction_change.abs().max() == found.latent_change.abs().max() == 0
    assert len(found.through_latent) == 0


def test_batches_and_the_number_of_edits_do_not_matter(
    clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects
) -> None:
    alone = measure_interventions(clip, sae, PROMPTS, edits(pixels)[1], n_latents=3, batch_size=5, progress=False)
    rows = [effects.row("draw", against) for against in ("untouched", "flip", "dim")]
    torch.testing.assert_close(alone.prediction_change, effects.prediction_change[rows], **TIGHT)
    torch.testing.assert_close(alone.latent_error, effects.latent_error[rows], **TIGHT)
    one, other = alone.through(0, "a crane"), effects.through(rows[0], "a crane")
    assert one.keys() == other.keys()
    torch.testing.assert_close(list(one.values()), list(other.values()), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("where", ["after", "the function", "a control", "a control's function"])
def test_pictures_of_another_dtype_are_refused(
    clip: HookedCLIP, pixels: Tensor, sae: Any, dtype: torch.dtype, where: str
) -> None:
    def wrong(pictures: Tensor) -> Tensor:
        return (pictures.clamp(0, 1) * 255).to(dtype)

    after = {"after": wrong(pixels[:3]), "the function": wrong}.get(where, darker)
    controls = {"a control": {"c": wrong(pixels[:3])}, "a control's function": {"c": wrong}}.get(where, {})
    edit = Intervention("odd", "overlay", pixels[:3], after, controls=controls)
    read: list[int] = []
    with (
        pytest.raises(InputError, match=f"'odd' makes {dtype} of torch.float64"),
        clip.vision.hooks(fwd_hooks=[("hook_embed", lambda value, hook: read.append(len(value)))]),
    ):
        measure_interventions(clip, sae, PROMPTS, edit, progress=False)
    assert bool(read) == ("function" in where)  # what is there already is refused before anything is computed


def test_an_edit_in_place_leaves_the_pictures_as_they_are(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    def in_place(pictures: Tensor) -> Tensor:
        return pictures.mul_(0.5)

    own = pixels[:3].clone()
    found, expected = (
        measure_interventions(clip, sae, PROMPTS, [
            Intervention("first", "overlay", own, edit, controls={"flip": lambda x: x.flip(-1), "dim": edit}),
            Intervention("second", "overlay", own, edit),
        ], n_latents=2, progress=False)
        for edit in (in_place, darker)
    )  # fmt: skip
    assert torch.equal(own, pixels[:3])
    for name in ("prediction_before", "prediction_change", "latent_change", "through_change"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_saved_and_loaded(effects: InterventionEffects, tmp_path: Path) -> None:
    effects.save(tmp_path / "effects.safetensors")
    found = InterventionEffects.load(tmp_path / "effects.safetensors")
    assert (found.names, found.against, found.prompts) == (effects.names, effects.against, effects.prompts)
    assert torch.equal(found.through_change, effects.through_change)
    assert torch.equal(found.latent_t, effects.latent_t)
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(LoadError, match=r"InterventionEffects\.save"):
        InterventionEffects.load(tmp_path / "other")


def test_the_table(effects: InterventionEffects) -> None:
    frame = effects.to_frame()
    assert len(frame) == len(effects.names) * len(PROMPTS)
    own = frame[(frame.intervention == "shift") & (frame.prompt == "a duck")].iloc[0]
    assert own.change == pytest.approx(own.after - own.before, abs=1e-12)
    assert own.t == pytest.approx(own.change / own.error)


def test_wrong_input(clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects) -> None:
    fine = Intervention("a", "overlay", pixels[:2], darker)
    for wrong, message in [
        ([fine, fine], "called 'a'"),
        ([], "nothing to measure"),
        (Intervention("a", "overlay", pixels[:1], darker), "two pictures or more"),
        (Intervention("a", "overlay", pixels[:2].byte(), darker), "floats"),
        (Intervention("a", "overlay", pixels[:2], pixels[:3]), "one by one"),
        (Intervention("a", "overlay", pixels[:2], darker, controls={"untouched": darker}), "names the pictures"),
    ]:
        with pytest.raises(InputError, match=message):
            measure_interventions(clip, sae, PROMPTS, wrong, progress=False)
    with pytest.raises(InputError, match="no edit 'shift' against 'flip'"):
        effects.row("shift", "flip")
    with pytest.raises(InputError, match="was not measured"):
        effects.through(0, "a goose")


def test_nothing_stays_behind_after_an_exception(clip: HookedCLIP, pixels: Tensor, sae: Any) -> None:
    before = {name: value.clone() for name, value in clip.native.state_dict().items()}
    plain = clip.vision(pixels[:2]).detach()

    def fails(pictures: Tensor) -> Tensor:
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        measure_interventions(clip, sae, PROMPTS, Intervention("a", "crop", pixels[:2], fails), progress=False)
    assert torch.is_grad_enabled()
    assert torch.equal(clip.vision(pixels[:2]), plain)
    assert all(torch.equal(value, before[name]) for name, value in clip.native.state_dict().items())


@given(
    word=st.text(alphabet="abcdefgh", min_size=1, max_size=9),
    x=st.floats(0, 1), y=st.floats(0, 1), height=st.floats(0.05, 1.0), dark=st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_a_word_lies_on_its_plate_inside_the_picture(word: str, x: float, y: float, height: float, dark: bool) -> None:
    grey = torch.full((2, 3, 40, 60), 120, dtype=torch.uint8)
    written = draw_word(grey, word, x=x, y=y, height=height, dark=dark)
    plate = draw_word(grey, word, x=x, y=y, height=height, dark=dark, letters=False)
    assert written.shape == grey.shape
    assert bool((grey == 120).all())
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0, 0], written[0, 2])
    on_plate = (plate != 120).any(dim=1)[0]
    assert bool((plate[0, 0][on_plate] == (255 if dark else 0)).all())
    assert bool((written[0, 0][~on_plate] == 120).all())
    rows, columns = on_plate.nonzero().T
    assert int(on_plate.sum()) == (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1)


def test_letters_make_the_difference() -> None:
    grey = torch.full((1, 3, 64, 64), 120, dtype=torch.uint8)
    words = [draw_word(grey, word) for word in ("crane", "heart")] + [draw_word(grey, "crane", letters=False)]
    assert len({word.numpy().tobytes() for word in words}) == 3
    assert draw_word(grey, "crane", dark=False).min() == 0


@given(left=st.integers(0, 6), top=st.integers(0, 4), width=st.integers(1, 4), height=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_masked_box_has_the_mean_of_its_surroundings(left: int, top: int, width: int, height: int) -> None:
    pictures = torch.rand(2, 3, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    box = [left, top, left + width, top + height]
    masked = mask_boxes(pictures, torch.tensor([box, [-1] * 4]))
    assert torch.equal(masked[1], pictures[1])
    for channel in range(3):
        inside = masked[0, channel, top : top + height, left : left + width]
        expected = oracle.ring_mean(pictures[0, channel].tolist(), box)
        torch.testing.assert_close(inside, torch.full_like(inside, expected))
    outside = torch.ones(7, 10, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert torch.equal(masked[0][:, outside], pictures[0][:, outside])


def test_wrong_pictures_to_draw_on() -> None:
    grey = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="bytes"):
        draw_word(grey.float(), "crane")
    with pytest.raises(InputError, match="one line"):
        draw_word(grey, " ")
    with pytest.raises(InputError, match="fractions"):
        draw_word(grey, "crane", x=1.5)
    with pytest.raises(InputError, match="does not lie"):
        mask_boxes(grey, torch.tensor([[4, 4, 9, 6]]))
    with pytest.raises(InputError, match="boxes"):
        mask_boxes(grey, torch.zeros(2, 4))


def test_a_target_stands_for_texts(clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects) -> None:
    with torch.no_grad():
        vectors = 3 * clip.embed_texts(PROMPTS)  # of any length
    target = direction_target(vectors, labels=PROMPTS)
    found = measure_interventions(clip, sae, target, edits(pixels), n_latents=3, batch_size=2, progress=False)
    assert found.prompts == tuple(PROMPTS)
    torch.testing.assert_close(found.prediction_change, effects.prediction_change, **TIGHT)
    assert torch.equal(found.through_latent, effects.through_latent)
    fine = edits(pixels)[0]
    for wrong, message in [
        (direction_target(torch.ones(1, 3)), "of the same model"),
        (direction_target(vectors, cosine=False), "inner product"),
        ([], "no prompt"),
    ]:
        with pytest.raises(InputError, match=message):
            measure_interventions(clip, sae, wrong, fine, progress=False)


def test_the_latents_tried_are_those_of_the_greatest_estimate(
    clip: HookedCLIP, pixels: Tensor, sae: Any, effects: InterventionEffects
) -> None:
    hook, signs = sae.cfg.metadata.hook_name, set()
    with torch.no_grad():
        text = F.normalize(clip.native.encode_text(clip.tokenize(PROMPTS)), dim=-1)
        old = encode(clip.vision, pixels[:5], sae).dense()
    for name, after in (("shift", edits(pixels)[0].after), ("draw", darker(pixels[:5]))):
        row, new = effects.row(name), encode(clip.vision, after, sae).dense()
        for place in set(effects.through_prompt[effects.through_row == row].tolist()):
            activation = clip.vision.run_to(after, hook).detach().requires_grad_()
            embedding = clip.vision.run_from(hook, activation)
            (gradient,) = torch.autograd.grad((F.normalize(embedding, dim=-1) @ text[place]).sum(), activation)
            moved = [(new - old)[:, :, latent, None] * sae.W_dec[latent].detach() for latent in range(37)]
            estimate = torch.stack([(one * gradient[:, 1:]).sum() / 5 for one in moved])
            tried = effects.through(row, PROMPTS[place])
            assert set(tried) == set(estimate.abs().topk(3).indices.tolist())
            signs |= {float(estimate[latent]) > 0 for latent in tried}
    assert signs == {True, False}  # a great fall is tried as well as a great rise
