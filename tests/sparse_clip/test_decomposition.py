"""SpLiCE: the objective against scikit-learn, KKT conditions, what a gap bounds, and embeddings put back."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, normalise
from clip_lens_ext.sparse_clip import Decomposition, decompose
from clip_lens_ext.sparse_clip.nonnegative_lasso import solve


def unit(n: int, d: int, seed: int, *, spread: float = 1.0) -> Tensor:
    """Unit vectors; with a small spread all of them lie close to one direction."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows[:1] * (1 - spread) + rows * spread, dim=1)


def objective(dictionary: Tensor, z: Tensor, w: Tensor, l1: float) -> float:
    fit = 0.0
    for j in range(dictionary.shape[1]):
        fit += (float(z[j]) - math.fsum(float(w[i]) * float(dictionary[i, j]) for i in range(len(w)))) ** 2
    return fit / 2 + l1 * math.fsum(float(v) for v in w)


def terms_of(vectors: Tensor) -> cle.TermEmbeddings:
    return cle.TermEmbeddings.from_vectors(vectors, [f"term {i}" for i in range(len(vectors))], model="elsewhere")


@settings(deadline=None, max_examples=15)
@given(
    n_term=st.integers(1, 90), d=st.integers(2, 16), l1=st.sampled_from([0.01, 0.1, 0.4]), seed=st.integers(0, 999),
    spread=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_the_minimum(n_term: int, d: int, l1: float, seed: int, spread: float) -> None:
    from sklearn.linear_model import Lasso

    dictionary, rows = unit(n_term, d, seed, spread=spread), unit(3, d, seed + 5000, spread=spread)
    found = solve(dictionary, rows, l1, tol=1e-8, max_iter=4000)
    assert bool((found.weights >= 0).all())
    assert float(found.gap.max()) <= 0.5e-8
    for z, w, gap in zip(rows, found.weights, found.gap.tolist(), strict=True):
        # The gap bounds how far the objective is above any other's, scikit-learn's among them.
        oracle = Lasso(alpha=l1 / d, fit_intercept=False, positive=True, max_iter=20_000, tol=1e-8)
        theirs = torch.from_numpy(oracle.fit(dictionary.T.numpy(), z.numpy()).coef_)
        own, other = objective(dictionary, z, w, l1), objective(dictionary, z, theirs, l1)
        assert own - other <= gap + 1e-12
        # ... and how far the sums of words are from each other, even where the weights are not unique.
        apart = float(((w - theirs) @ dictionary).square().sum()) / 2
        assert apart <= 2 * (gap + max(0.0, other - own)) + 1e-9
        # KKT: D r = l1 where a weight is above zero, and at most l1 where it is zero.
        slope = dictionary @ (z - w @ dictionary)
        assert float((slope - l1).max()) <= 1e-4
        assert float(((slope - l1).abs() * w).max()) <= 1e-4


def test_the_gap_is_the_dual_by_its_formula() -> None:
    dictionary, rows, l1 = unit(40, 8, 0), unit(4, 8, 1), 0.1
    rough = solve(dictionary, rows, l1, tol=1e-12, max_iter=3)
    exact = solve(dictionary, rows, l1, tol=1e-12, max_iter=4000)
    for z, w, best, gap in zip(rows, rough.weights, exact.weights, rough.gap.tolist(), strict=True):
        residual = z - w @ dictionary
        feasible = torch.linspace(0, l1 / float((dictionary @ residual).max()), 30_001, dtype=torch.float64)
        dual = 0.5 - 0.5 * (feasible[:, None] * residual - z).square().sum(dim=1)
        expected = objective(dictionary, z, w, l1) - float(dual.max())
        assert gap == pytest.approx(expected, abs=1e-6)
        assert gap >= objective(dictionary, z, w, l1) - objective(dictionary, z, best, l1) - 1e-12


@pytest.mark.parametrize("solver", ["working_set", "sklearn"])
def test_decompose_by_its_steps(solver: Any) -> None:
    embeddings, words, l1 = unit(7, 10, 0, spread=0.5) * 3, unit(60, 10, 1, spread=0.5), 0.05
    found = decompose(embeddings.float(), terms_of(words.float()), l1=l1, solver=solver, tol=1e-7, batch_size=3,
                      progress=False)  # fmt: skip
    e = F.normalize(embeddings.float().double(), dim=1)
    u, dictionary = F.normalize(e - e.mean(0), dim=1), F.normalize(words - words.mean(0), dim=1)
    expected = solve(dictionary, u, l1, tol=1e-10, max_iter=4000).weights
    w = found.dense()
    torch.testing.assert_close(w, expected, atol=2e-3, rtol=0)
    assert found.l0.tolist() == [sum(float(v) > 0 for v in row) for row in w]
    again = F.normalize(F.normalize(w @ dictionary, dim=1) + e.mean(0), dim=1)
    torch.testing.assert_close(found.to_embedding().double(), again, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.cosine, (again * e).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.cosine_centred, (F.normalize(w @ dictionary, dim=1) * u).sum(1), atol=1e-5, rtol=0)
    best = max(range(60), key=lambda i: float(w[2, i]))
    assert found.top(1)[2] == [(f"term {best}", float(w[2, best]))]
    assert bool(found.converged.all())


def test_properties(tmp_path: Any) -> None:
    embeddings, words = unit(6, 12, 0), unit(50, 12, 1)
    plain = decompose(embeddings, terms_of(words), l1=0.1, tol=1e-9, progress=False)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    moved = decompose(embeddings, terms_of(words[order]), l1=0.1, tol=1e-9, progress=False)
    torch.testing.assert_close(moved.dense(), plain.dense()[:, order], atol=1e-5, rtol=0)
    back = decompose(embeddings.flip(0), terms_of(words), l1=0.1, tol=1e-9, batch_size=1, progress=False)
    torch.testing.assert_close(back.dense().flip(0), plain.dense(), atol=1e-5, rtol=0)
    sizes = [decompose(embeddings, terms_of(words), l1=l1, progress=False) for l1 in (0.01, 0.1, 0.5)]
    cosines = [float(found.cosine_centred.mean()) for found in sizes]
    assert cosines == sorted(cosines, reverse=True)
    nothing = decompose(embeddings, terms_of(words), l1=2.0, progress=False)
    assert int(nothing.l0.sum()) == 0
    assert nothing.top()[0] == []
    mean = F.normalize(nothing.image_mean, dim=0)
    torch.testing.assert_close(nothing.to_embedding(), mean.expand(6, -1))
    plain.save(tmp_path / "d.safetensors")
    again = Decomposition.load(tmp_path / "d.safetensors")
    assert torch.equal(again.dense(), plain.dense())
    assert repr(again) == repr(plain)
    with pytest.raises(LoadError):
        cle.TermEmbeddings.load(tmp_path / "d.safetensors")


def test_an_l0_is_searched_for() -> None:
    embeddings, words = unit(20, 16, 0), unit(80, 16, 1)
    found = decompose(embeddings, terms_of(words), l0=5, progress=False)
    assert float(found.l0.double().mean()) == pytest.approx(5, rel=0.02)
    again = decompose(embeddings, terms_of(words), l1=found.l1, progress=False)
    assert torch.equal(again.l0, found.l0)
    with pytest.raises(InputError, match="out of reach"):
        decompose(embeddings, terms_of(words), l0=70, progress=False)


def test_an_l0_that_cannot_be_had_is_said() -> None:
    embeddings, words = unit(4, 16, 0), unit(80, 16, 1)
    with pytest.warns(UserWarning, match=r"the nearest mean number of words is 0\.25, not 0\.05") as said:
        found = decompose(embeddings, terms_of(words), l0=0.05, progress=False)
    assert int(found.l0.sum()) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = decompose(embeddings, terms_of(words), l0=0.25, progress=False)
    assert int(exact.l0.sum()) == 1


@pytest.mark.parametrize("solver", ["working_set", "sklearn"])
def test_what_has_not_converged_is_said(solver: Any) -> None:
    embeddings, words = unit(5, 24, 0, spread=0.2), unit(300, 24, 1, spread=0.2)
    with pytest.warns(UserWarning, match=r"5 of 5 samples have not converged after 2 steps"):
        found = decompose(embeddings, terms_of(words), l1=0.001, max_iter=2, tol=1e-9, solver=solver, progress=False)
    assert not bool(found.converged.any())
    assert bool((found.gap > 0.5e-9).all())
    assert "5 NOT CONVERGED" in repr(found)


def test_of_the_planted_clip() -> None:
    clip, world = cle.planted_clip(), PlantedWorld(0)
    names = [entry.name for entry in world.unambiguous_classes]
    batch = world.sample(90, seed=4, split="test", classes=names)
    labels = torch.tensor([names.index(world.classes[int(label)].name) for label in batch.labels])
    with torch.no_grad():
        embeddings = clip.embed_images(normalise(batch.images))
    terms = cle.Vocabulary.from_terms([word for word in world.vocabulary if word not in ("a", "of")]).embed(
        clip, progress=False
    )
    prompts = clip.embed_texts([f"a photo of a {name}" for name in names], normalize=True).detach()

    def accuracy(rows: Tensor) -> float:
        return float(((F.normalize(rows, dim=1) @ prompts.T).argmax(1) == labels).double().mean())

    found = decompose(embeddings, terms, l1=0.02, progress=False)
    assert bool(found.converged.all())
    few = decompose(embeddings, terms, l0=4, progress=False)
    plain, many, some = (accuracy(rows) for rows in (embeddings, found.to_embedding(), few.to_embedding()))
    assert plain >= many - 0.1 > some - 0.3
    assert many > 0.6
    own = [any(word in names[int(label)].split() for word, _ in words)
           for label, words in zip(labels, found.top(5), strict=True)]  # fmt: skip
    assert sum(own) / len(own) > 0.6


def test_wrong_input() -> None:
    embeddings, words = unit(4, 6, 0), unit(9, 6, 1)
    nan = embeddings.clone()
    nan[2, 0] = torch.nan
    for arguments, message in (
        ({"l1": None}, "either l1 or l0"),
        ({"l0": 3}, "either l1 or l0"),
        ({"l1": 0.0}, "l1 is above zero"),
        ({"l1": float("nan")}, "l1 is above zero"),
        ({"tol": -1.0}, "tol is above zero"),
        ({"solver": "admm"}, "solver is one of"),
        ({"max_iter": 0}, "max_iter"),
        ({"batch_size": 0}, "batch_size"),
        ({"embeddings": embeddings[:, :5]}, "of one model"),
        ({"embeddings": embeddings[0]}, r"floats \[sample d_embed\]"),
        ({"embeddings": embeddings.long()}, r"floats \[sample d_embed\]"),
        ({"embeddings": embeddings[:0]}, "at least one"),
        ({"embeddings": nan}, "number 2 is zero or not finite"),
        ({"embeddings": embeddings[:1]}, "equal to the mean"),
        ({"image_mean": torch.zeros(5)}, r"finite vector \[6\]"),
        ({"term_mean": torch.full((6,), torch.nan)}, "term_mean"),
    ):
        given: dict[str, Any] = {"embeddings": embeddings, "terms": terms_of(words), "l1": 0.1, **arguments}
        with pytest.raises(InputError, match=message):
            decompose(progress=False, **given)
    with pytest.raises(InputError, match="k is a whole number"):
        decompose(embeddings, terms_of(words), l1=0.1, progress=False).top(0)
