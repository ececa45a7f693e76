"""`collect_references` against loops over dense codes, in any split of the data."""

import dataclasses

import pytest
import torch
from open_clip.model import CLIP
from oracles.references import top_references
from PIL import Image
from sae_lens import TopKSAE, TopKSAEConfig

from clip_lens_ext.errors import HookNameError, InputError
from clip_lens_ext.saes.codes import SparseCodes, encode
from clip_lens_ext.semantics import References, collect_references
from clip_lens_ext.semantics.peaks import TopSamples, peaks
from clip_lens_ext.towers import HookedTower

HOOK, D_SAE = "blocks.0.hook_resid_post", 40


@pytest.fixture(scope="module")
def model() -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
        text = {"context_length": 6, "vocab_size": 30, "width": 32, "heads": 2, "layers": 2}
        return CLIP(16, vision, text).double().eval()


@pytest.fixture(scope="module")
def tower(model) -> HookedTower:
    return HookedTower(model.visual, model_name="tiny")


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    return make_sae()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(23, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_sae(scope: str = "all", tower: str = "vision", hook: str = HOOK) -> TopKSAE:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=D_SAE, k=6, dtype="float64"))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.tower, sae.cfg.metadata.token_scope = hook, tower, scope
    return sae


def collect(tower, data, sae, **settings) -> References:
    return collect_references(tower, data, sae, progress=False, **settings)


def rows(references: References, latent: int) -> list[tuple[int, float, int]]:
    found = references.of(latent)
    return list(zip(found.sample.tolist(), found.activation.tolist(), found.position.tolist(), strict=True))


def assert_same(a: References, b: References) -> None:
    for name in ("sample", "position", "indexes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.activation, b.activation, rtol=1e-6, atol=0)
    assert (a.names, a.n_samples, a.skipped) == (b.names, b.n_samples, b.skipped)


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("scope", ["all", "patches", "cls"])
def test_they_are_those_of_loops_over_dense_codes(tower, pixels, scope, k):
    sae = make_sae(scope)
    codes = encode(tower, pixels, sae)
    expected = top_references(codes.dense().tolist(), codes.position[0].tolist(), k)
    found = collect(tower, pixels, sae, k=k, batch_size=5)
    assert found.sample.shape == found.activation.shape == found.position.shape == (D_SAE, k)
    assert k < 30 or all(len(rows) < k for rows in expected)  # there is padding to be tested
    for latent in range(D_SAE):
        assert [(sample, position) for sample, _, position in rows(found, latent)] == [
            (sample, position) for sample, _, position in expected[latent]
        ]
        activations = [activation for _, activation, _ in expected[latent]]
        assert found.of(latent).activation.tolist() == pytest.approx(activations, rel=1e-6)


def test_the_split_into_batches_does_not_matter(tower, pixels, sae):
    whole = collect(tower, pixels, sae, k=5, batch_size=23)
    for batch_size in (1, 4, 22):
        assert_same(collect(tower, pixels, sae, k=5, batch_size=batch_size), whole)


@pytest.mark.parametrize("cuts", [(9,), (1, 20), (4, 8, 12, 16, 20)])
def test_merged_passes_are_one_pass(tower, pixels, sae, cuts):
    whole = collect(tower, pixels, sae, k=5)
    parts = [collect(tower, part, sae, k=5) for part in pixels.tensor_split(list(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert torch.equal(merged.sample, whole.sample)
    assert torch.equal(merged.position, whole.position)
    assert torch.equal(merged.indexes, whole.indexes)
    assert merged.n_samples == 23
    right = parts[-1]  # the other way of setting brackets
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    assert torch.equal(right.sample, merged.sample)
    assert torch.equal(right.activation, merged.activation)


def test_ties_go_to_the_first_sample_and_the_first_token(tower, pixels, sae):
    doubled = torch.cat([pixels[:6], pixels[:6]])  # sample i + 6 is sample i
    found = collect(tower, doubled, sae, k=3, batch_size=12)
    for latent in range(D_SAE):
        samples, activations = found.of(latent).sample.tolist(), found.of(latent).activation.tolist()
        assert samples == sorted(samples, key=lambda sample: (-activations[samples.index(sample)], sample))
        for place, sample in enumerate(samples):
            if sample >= 6:
                assert samples[place - 1] == sample - 6
    codes = codes_of({(0, 1, 3): 2.0, (0, 2, 3): 2.0, (1, 0, 3): 2.0})
    top = TopSamples(D_SAE, 2)
    top.update(peaks(codes), first=10)
    assert top.sample[3].tolist() == [10, 11]
    assert top.position[3].tolist() == [1, 0]


def codes_of(entries: dict[tuple[int, int, int], float]) -> SparseCodes:
    dense = torch.zeros(2, 4, D_SAE)
    for place, value in entries.items():
        dense[place] = value
    return SparseCodes.from_dense(dense)


def test_an_activation_that_is_not_positive_is_no_reference():
    top = TopSamples(D_SAE, 2)
    top.update(peaks(codes_of({(0, 1, 3): -2.0, (1, 0, 3): -1.0, (1, 2, 3): 0.5})), first=0)
    assert top.sample[3].tolist() == [1, -1]
    assert top.position[3].tolist() == [2, -1]
    assert top.activation[3].tolist() == [0.5, 0.0]


def test_padding_and_latents_that_never_fire(tower, pixels, sae):
    found = collect(tower, pixels[:2], sae, k=4)
    silent = [latent for latent in range(D_SAE) if found.sample[latent, 0] < 0]
    assert silent
    assert len(found.of(silent[0]).sample) == 0
    assert found.of(silent[0]).names == ()
    empty = found.sample < 0
    assert found.activation[empty].eq(0).all()
    assert found.position[empty].eq(-1).all()
    assert not empty[:, :-1].gt(empty[:, 1:]).any()  # padding only at the end


def test_some_latents_alone(tower, pixels, sae):
    whole = collect(tower, pixels, sae, k=3)
    active = whole.sample[:, 0].ge(0).nonzero().flatten().tolist()
    wanted = [active[3], active[0]]
    some = collect(tower, pixels, sae, k=3, latents=wanted)
    assert some.latents.tolist() == sorted(wanted)
    for latent in wanted:
        assert rows(some, latent) == rows(whole, latent)
    assert some.sample[active[1]].eq(-1).all()
    with pytest.raises(InputError, match=rf"latent {active[1]} was not collected"):
        some.of(active[1])


def test_unreadable_samples_are_skipped_and_not_counted(tower, tmp_path, sae):
    def preprocess(picture: Image.Image) -> torch.Tensor:
        return torch.tensor(list(picture.tobytes()), dtype=torch.float64).reshape(32, 32, 3).permute(2, 0, 1) / 255

    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    found = collect(tower, tmp_path, sae, k=4, preprocess=preprocess)
    assert found.names == ("0.png", "2.png", "3.png")
    assert found.indexes.tolist() == [0, 2, 3]
    assert [skip.name for skip in found.skipped] == ["1.png"]
    assert int(found.sample.max()) == 2
    assert collect(tower, tmp_path, sae, k=4, preprocess=preprocess).merge(found).indexes.tolist() == [0, 2, 3, 4, 6, 7]
    with pytest.raises(InputError, match="preprocess="):
        collect(tower, tmp_path, sae)


def test_prompts_of_a_text_tower(model):
    tower = HookedTower(model, model_name="tiny")
    prompts = torch.randint(1, 29, (9, 6), generator=torch.Generator().manual_seed(3))
    prompts[torch.arange(9), torch.arange(9) % 4 + 2] = 29  # pooled at the greatest id
    sae = make_sae("eot", "text")
    codes = encode(tower, prompts, sae)
    found = collect(tower, prompts, sae, k=2, batch_size=4)
    for latent in range(D_SAE):
        for sample, activation, position in rows(found, latent):
            assert position == int(prompts[sample].argmax())
            assert activation == pytest.approx(float(codes.dense()[sample, 0, latent]), rel=1e-6)


def test_pooled_vectors_have_no_position(tower, pixels):
    found = collect(tower, pixels, make_sae("pooled", hook="hook_pooled"), k=2)
    assert found.sample.max() >= 0
    assert found.position.eq(-1).all()
    assert found.token_scope == "pooled"


def test_it_says_where_it_comes_from(tower, pixels, sae):
    found = collect(tower, pixels, sae, k=2)
    assert (found.hook_name, found.token_scope, found.k, found.d_sae) == (HOOK, "all", 2, D_SAE)
    assert found.provenance["model"] == "tiny"
    assert len(found.provenance["data_fingerprint"]) == 64
    assert "top 2 of 23 samples" in repr(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.n_samples = 3


def test_the_tower_is_as_before(tower, pixels, sae):
    before = tower(pixels[:2])
    collect(tower, pixels, sae, k=2)
    assert torch.equal(tower(pixels[:2]), before)
    assert torch.is_grad_enabled()
    assert not tower.list_hooks()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": True}, "k must be a positive integer"),
        ({"latents": [D_SAE]}, f"latents are 0 to {D_SAE - 1}, got {D_SAE} to {D_SAE}"),
        ({"latents": []}, "at least one integer"),
        ({"latents": [0.5]}, "at least one integer"),
        ({"batch_size": 0}, "batch_size"),
        ({"token_scope": "pooled"}, "pooled"),
    ],
)
def test_wrong_arguments(tower, pixels, sae, settings, message):
    with pytest.raises(InputError, match=message):
        collect(tower, pixels, sae, **settings)


def test_wrong_hook_latent_and_merge(tower, pixels, sae):
    with pytest.raises(HookNameError, match=r"blocks\.0\.hook_resid_post"):
        collect(tower, pixels, sae, hook_name="blocks.0.hook_resid_pots")
    found = collect(tower, pixels[:4], sae, k=2)
    with pytest.raises(InputError, match="latents are 0 to 39, got 40"):
        found.of(40)
    with pytest.raises(InputError, match="differ in k 2 and 3"):
        found.merge(collect(tower, pixels[:4], sae, k=3))
    with pytest.raises(InputError, match="differ in hook_name"):
        found.merge(collect(tower, pixels[:4], sae, k=2, hook_name="blocks.1.hook_resid_post"))
