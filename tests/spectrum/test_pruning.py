"""Pruning as hooks and as weights: the same, once and for as long as it lasts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracles import spectrum as oracle
from oracles.models import EMBED_DIM, build_clip, pictures, prompts
from oracles.zoo import BY_NAME, hf_clip, hf_siglip
from torch import Tensor, nn

import clip_lens_ext as cle
from clip_lens_ext.errors import HookNameError, InputError, UnsupportedModelError
from clip_lens_ext.spectrum.folding import _fold
from clip_lens_ext.towers import HookedCLIP, HookedTower

K = 6
X, IDS = pictures(3, dtype=torch.float64), prompts(3)
HOOK = "blocks.1.hook_resid_pre"


def clip_of(**variant: Any) -> HookedCLIP:
    return HookedCLIP(build_clip(**variant).double())


def split_of(d: int = EMBED_DIM, k: int = K, **fields: Any) -> cle.NoiseSplit:
    rows = torch.randn(40 * d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    found = cle.split_noise(rows, cut=k)
    return type(found)(**{**vars(found), **fields})


def weights(clip: HookedCLIP) -> list[Tensor]:
    return [value.clone() for value in clip.native.state_dict().values()]


@torch.no_grad()
def test_the_embedding_in_both_towers_and_nothing_afterwards() -> None:
    clip, split = clip_of(), split_of()
    before, image, text = weights(clip), clip.vision(X), clip.text(IDS)
    keep = torch.eye(EMBED_DIM).double() - torch.from_numpy(oracle.projector(split.basis.numpy()))
    with cle.prune(clip, split) as pruned:
        assert pruned is clip
        for found, plain in ((clip.vision(X), image), (clip.text(IDS), text)):
            torch.testing.assert_close(found, plain @ keep, rtol=1e-12, atol=1e-12)
        assert not torch.equal(clip.vision(X), image)
        once = clip.vision(X)
        with cle.prune(clip, split):
            torch.testing.assert_close(clip.vision(X), once, rtol=1e-12, atol=1e-12)
        assert torch.equal(clip.vision(X), once)  # the inner context took its own hooks alone
        assert torch.equal(clip.native.encode_image(X), image)  # the native model knows nothing of it
    assert torch.equal(clip.vision(X), image)
    assert torch.equal(clip.text(IDS), text)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(clip), strict=True))
    with cle.prune(clip, split, towers=["text"]):
        assert torch.equal(clip.vision(X), image)
        assert not torch.equal(clip.text(IDS), text)


@torch.no_grad()
def test_an_exception_takes_the_hooks_away() -> None:
    clip = clip_of()
    image = clip.vision(X)
    with pytest.raises(RuntimeError, match="on purpose"), cle.prune(clip, split_of()):
        raise RuntimeError("on purpose")
    assert torch.equal(clip.vision(X), image)
    with pytest.raises(HookNameError), cle.prune(clip, split_of(), hook_names=["hook_embedding", "hook_nothing"]):
        pass
    for tower in (clip.vision, clip.text):
        assert not any(point._forward_hooks for point in tower.hook_points())


@torch.no_grad()
@pytest.mark.parametrize("scope", ["cls", "patches", "all"])
def test_the_residual_stream_keeps_its_mean(scope: str) -> None:
    clip = clip_of()
    data = pictures(60, seed=4, dtype=torch.float64)
    found = cle.collect_covariance(clip.vision, data, HOOK, token_scope=scope, progress=False)[HOOK]
    with pytest.warns(UserWarning, match="to a dimension") if scope == "cls" else nullcontext():
        split = cle.split_noise(found, cut=10)
    assert (split.hook_name, split.tower, split.token_scope) == (HOOK, "vision", scope)
    before = clip.vision.run_with_cache(data, names_filter=HOOK)[1][HOOK]
    text = clip.text(IDS)
    taken = {"cls": slice(0, 1), "patches": slice(1, None), "all": slice(None)}[scope]
    with cle.prune(clip, split):
        after = clip.vision.run_with_cache(data, names_filter=HOOK)[1][HOOK]
        again = clip.vision(data)
        with cle.prune(clip, split):
            torch.testing.assert_close(clip.vision(data), again, rtol=1e-10, atol=1e-10)
        assert torch.equal(clip.text(IDS), text)
    expected = before.clone()
    expected[:, taken] = split.remove(before[:, taken], mean=found.mean)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
    mean = before[:, taken].flatten(0, 1).mean(0)
    torch.testing.assert_close(after[:, taken].flatten(0, 1).mean(0), mean, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("which", ["vision", "text"])
def test_each_tower_keeps_the_mean_of_its_own_modality(which: str) -> None:
    clip = clip_of()
    tower, x = {"vision": (clip.vision, X), "text": (clip.text, IDS)}[which]
    d = tower.cfg.d_model
    image, text = torch.randn(2, 40 * d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = cle.split_noise(image + 2, text - 3, rule="pooled", cut=K)  # a gap between the modalities
    with cle.prune(clip, split, hook_names=HOOK, towers=[which]):
        kept: list[Tensor] = []
        tower.run_with_hooks(x, fwd_hooks=[(HOOK, lambda value, hook: kept.append(value.clone()))])
    mean = (image + 2 if which == "vision" else text - 3).mean(dim=0)
    torch.testing.assert_close(
        kept[0] @ split.basis, (mean @ split.basis).expand(*kept[0].shape[:-1], K), rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
def test_the_end_of_text_token_of_a_text_tower() -> None:
    clip, width = clip_of(), 40
    split = split_of(width, 5, hook_name=HOOK, tower="text", token_scope="eot")
    before = clip.text.run_with_cache(IDS, names_filter=HOOK)[1][HOOK]
    with cle.prune(clip, split):
        after = clip.text.run_with_cache(IDS, names_filter=HOOK)[1][HOOK]
    row, end = torch.arange(3), IDS.argmax(dim=1)
    torch.testing.assert_close(after[row, end], split.remove(before[row, end], mean=split.means[0]))
    changed = (after != before).any(dim=-1)
    assert changed.sum() == 3
    assert changed[row, end].all()


FOLDED = {
    "open_clip": lambda: clip_of(),
    "open_clip Linear with bias": lambda: clip_of(text="first"),
    "Hugging Face": lambda: HookedCLIP(hf_clip().double().eval()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDED)
def test_folded_and_hooked_agree(name: str) -> None:
    clip, split = FOLDED[name](), split_of()
    x = torch.randn(3, 3, *clip.vision.cfg.image_size, generator=torch.Generator().manual_seed(1)).double()
    before = weights(clip)
    folded = cle.fold_pruning(clip, split)
    twice = cle.fold_pruning(folded, split)
    assert folded.model_name.endswith("without 6 noise dimensions")
    with cle.prune(clip, split):
        hooked = clip.vision(x), clip.text(IDS)
    for other in (folded, twice):
        for found, expected in zip((other.vision(x), other.text(IDS)), hooked, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(clip), strict=True))
    single = cle.fold_pruning(HookedCLIP(clip.native.float()), split)
    # The promise, in float32, with embeddings of unit size.
    torch.testing.assert_close(single.vision(x.float()).double(), hooked[0], rtol=1e-6, atol=2e-6)


LINEAR = ["hf-vision-projected", "hf-text-projected", "hf-siglip-text", "timm-cls", "timm-avg", "coca-vision",
          "coca-text", "resnet", "convnext", "roberta"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", LINEAR)
def test_every_family_with_a_linear_end(name: str) -> None:
    case = BY_NAME[name]
    tower = HookedTower(case.build().double())
    split, x = split_of(tower.cfg.d_embed), case.inputs(dtype=torch.float64)
    expected = split.remove(tower(x))
    _fold(tower, split)
    # A bias of a Linear is folded too; other rounding in other orders.
    torch.testing.assert_close(tower(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hf-vision-model", "hf-siglip-vision", "timm-siglip"])
def test_a_tower_without_a_linear_end_is_refused(name: str) -> None:
    tower = HookedTower(BY_NAME[name].build())
    if name == "timm-siglip":  # as SigLIP is: attention pooling, and no head behind it
        tower.native.trunk.head = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"does not end in a linear map.*use prune"):
        _fold(tower, split_of(tower.cfg.d_embed))


def test_siglip_and_unprojected_models_are_refused_whole() -> None:
    clip = HookedCLIP(hf_siglip().eval())
    before = weights(clip)
    with pytest.raises(UnsupportedModelError, match="its attention pooling adds an MLP"):
        cle.fold_pruning(clip, split_of(48))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(clip), strict=True))
    with pytest.raises(InputError, match="the text tower's embedding has 40"):
        cle.fold_pruning(clip_of(text="unprojected"), split_of())


def test_a_vision_tower_alone() -> None:
    clip, split = HookedCLIP(build_clip().double().visual), split_of()
    with cle.prune(clip, split), torch.no_grad():
        hooked = clip.vision(X)
    torch.testing.assert_close(cle.fold_pruning(clip, split).vision(X).detach(), hooked, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="has no tower 'text'"), cle.prune(clip, split, towers=["text"]):
        pass


@pytest.mark.parametrize(
    ("split", "settings", "message"),
    [
        (lambda: split_of(k=EMBED_DIM), {}, "pruning would leave nothing"),
        (lambda: split_of(7, 2), {}, "of 7 dimensions, and hook_embedding of the vision tower has 20"),
        (lambda: split_of(48, 2), {"hook_names": HOOK}, "it is not known of which this split is"),
        (lambda: split_of(48, 2), {"hook_names": HOOK, "towers": ["text"]}, "of the text tower has 40"),
        (lambda: split_of(), {"hook_names": []}, "no hook named"),
        (lambda: split_of(), {"towers": "text"}, "a list of 'vision' and 'text'"),
        (lambda: split_of(), {"towers": ["audio"]}, "no tower 'audio'"),
        (lambda: torch.eye(3), {}, "a NoiseSplit is needed"),
    ],
)
def test_wrong_input(split: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), cle.prune(clip_of(), split(), **settings):
        pass


def test_folding_a_residual_stream_is_refused() -> None:
    with pytest.raises(InputError, match=f"the split is of {HOOK}, and a LayerNorm follows"):
        cle.fold_pruning(clip_of(), split_of(48, 2, hook_name=HOOK, tower="vision"))
