"""A captioner: its loss and its greedy words by loops, training that resumes to the bit, and steered captions."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedTokenizerFast

import clip_lens_ext as cle
from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.planted import PlantedWorld, WordTokenizer, normalise
from clip_lens_ext.sparse_clip import (
    CaptionSteering,
    CaptionTraining,
    SparseCaptioner,
    SteeringData,
    caption_steering,
    sparse_captioner,
    train_captioner,
)
from clip_lens_ext.sparse_clip.caption_steering import named_classes
from clip_lens_ext.sparse_clip.caption_tokens import caption_tokenizer

WORDS = ("a", "red", "blue", "star", "kite", "and")
D = 6
CAPTIONS = ["a red star", "a blue star", "a kite", "a red kite and a blue star"] * 5


def config_of(n_ids: int, **extra: Any) -> GPT2Config:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, **extra}
    return GPT2Config(vocab_size=n_ids, bos_token_id=0, eos_token_id=0, **sizes)


def captioner_of(seed: int = 0, **extra: Any) -> SparseCaptioner:
    tokenizer = WordTokenizer(WORDS)
    return sparse_captioner(config_of(tokenizer.vocab_size, **extra), tokenizer, D, n_prefix=3, d_hidden=8, seed=seed)


def codes_of(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).relu()


def seen_by_loops(captioner: SparseCaptioner, code: Tensor, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token, by one run over the prefix and the tokens so far, without a cache."""
    first, _, last = captioner.adapter
    hidden = torch.stack([(weight * code).sum() + bias for weight, bias in zip(first.weight, first.bias, strict=True)])
    hidden = torch.stack([0.5 * v * (1 + torch.erf(v / math.sqrt(2))) for v in hidden])
    prefix = torch.stack([(weight * hidden).sum() + bias for weight, bias in zip(last.weight, last.bias, strict=True)])
    table = captioner.language_model.transformer.wte.weight
    rows = torch.cat([prefix.view(3, -1), table[ids]]) if ids else prefix.view(3, -1)
    return captioner.language_model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)


@torch.no_grad()
def test_the_loss_by_loops() -> None:
    captioner, codes = captioner_of().double(), codes_of(3).double()
    ids = [[*captioner.tokenizer.to_ids(text), captioner.tokenizer.end_id] for text in CAPTIONS[1:4]]
    total = 0.0
    for code, row in zip(codes, ids, strict=True):
        for place, token in enumerate(row):
            total -= float(seen_by_loops(captioner, code, row[:place])[token])
    n_tokens = torch.tensor([len(row) for row in ids])
    padded = torch.tensor([row + [0] * (8 - len(row)) for row in ids])
    found = captioner.loss(codes, padded, n_tokens)
    assert float(found) == pytest.approx(total / int(n_tokens.sum()), rel=1e-6)
    other = padded.masked_fill(torch.arange(8) >= n_tokens[:, None], 3)
    assert torch.equal(captioner.loss(codes, other, n_tokens), found)  # what pads is not seen


@torch.no_grad()
def test_greedy_words_by_loops() -> None:
    captioner = captioner_of(seed=3).double()
    for weight in captioner.parameters():
        weight.mul_(4)  # so that codes matter
    codes = codes_of(9).double()
    found = captioner.generate(codes, max_tokens=7, batch_size=4)
    for code, text, n, ended in zip(codes, found.texts, found.n_tokens, found.ended, strict=True):
        ids: list[int] = []
        while len(ids) < 7 and (not ids or ids[-1] != captioner.tokenizer.end_id):
            ids.append(int(seen_by_loops(captioner, code, ids).argmax()))
        assert ended == (ids[-1] == captioner.tokenizer.end_id)
        assert n == len(ids) - ended
        assert text == captioner.tokenizer.to_text(ids[:n])
    assert len(set(found.texts)) > 1
    assert found == captioner.generate(codes, max_tokens=7, batch_size=1)


def test_where_captions_end() -> None:
    captioner = captioner_of()
    train_captioner(captioner, torch.eye(D)[:4], CAPTIONS[:4], joint_steps=150, joint_lr=1e-2, batch_size=4, held_out=0,
                    progress=False)  # fmt: skip
    found = captioner.generate(torch.eye(D)[:4], max_tokens=8)
    assert found.texts == tuple(CAPTIONS[:4])
    assert (found.n_tokens, found.ended) == ((3, 3, 2, 7), (True,) * 4)
    cut = captioner.generate(torch.eye(D)[:4], max_tokens=3)
    assert cut.texts[3] == "a red kite"
    assert (cut.n_tokens, cut.ended) == ((3, 3, 2, 3), (False, False, True, False))


def train(captioner: SparseCaptioner, **extra: Any) -> CaptionTraining:
    given: dict[str, Any] = {"adapter_steps": 6, "joint_steps": 8, "batch_size": 4, "evaluate_every": 5, **extra}
    return train_captioner(captioner, codes_of(20), CAPTIONS, progress=False, **given)


@pytest.mark.parametrize("stops", [(3,), (6,), (4, 9), (14,)])
def test_a_resumed_training_is_one_training(stops: tuple[int, ...], tmp_path: Path) -> None:
    whole = captioner_of()
    assert whole.language_model.config.resid_pdrop > 0  # dropout, which has to be the same too
    expected = train(whole)
    for stop in stops:
        captioner = captioner_of()
        part = train(captioner, checkpoint=tmp_path / "c.pt", stop_after=stop, checkpoint_every=2)
        assert all(weight.requires_grad for weight in captioner.parameters())  # as before, whichever stage it ended in
        assert len(part.loss) == stop
    torch.manual_seed(123)
    again = captioner_of()
    found = train(again, checkpoint=tmp_path / "c.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.held_out_loss, expected.held_out_loss)
    assert expected.held_out_step.tolist() == [5, 10, 14]
    assert expected.stage.tolist() == [0] * 6 + [1] * 8
    assert (expected.n_train, expected.n_held_out) == (18, 2)


def test_stages_and_what_is_left_as_it_was() -> None:
    captioner = captioner_of()
    before = copy.deepcopy(captioner.state_dict())
    captioner.language_model.transformer.wpe.weight.requires_grad_(False)
    state = torch.get_rng_state()
    train(captioner, stop_after=6)
    after = captioner.state_dict()
    same = {name: torch.equal(before[name], value) for name, value in after.items()}
    assert all(same[name] for name in same if name.startswith("language_model"))
    assert not any(same[name] for name in same if name.startswith("adapter"))
    assert torch.equal(torch.get_rng_state(), state)
    frozen = [name for name, weight in captioner.named_parameters() if not weight.requires_grad]
    assert frozen == ["language_model.transformer.wpe.weight"]
    assert not captioner.training
    assert all(weight.grad is None for weight in captioner.parameters())
    joint = captioner_of()
    train(joint, adapter_steps=0)
    assert not torch.equal(joint.language_model.transformer.wte.weight, before["language_model.transformer.wte.weight"])
    assert not torch.equal(captioner_of(seed=1).adapter[0].weight, captioner_of().adapter[0].weight)
    with pytest.raises(InputError, match="NaN or infinite at step"):
        train(captioner_of(), adapter_lr=1e30)


def test_checkpoints_of_others(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    train(captioner_of(), checkpoint=path)
    with pytest.raises(InputError, match="batch_size was 4 and is now 5"):
        train(captioner_of(), checkpoint=path, batch_size=5)
    with pytest.raises(InputError, match="captioner was"):
        train(captioner_of(seed=1), checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="no checkpoint of a captioner"):
        train(captioner_of(), checkpoint=path)


def test_on_disk(tmp_path: Path) -> None:
    captioner, words = captioner_of(seed=2), WordTokenizer(WORDS)
    training = train(captioner)
    captioner.save(tmp_path / "captioner")
    again = SparseCaptioner.load(tmp_path / "captioner", words)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in captioner.state_dict().items())
    assert again.generate(codes_of(4), max_tokens=8) == captioner.generate(codes_of(4), max_tokens=8)
    training.save(tmp_path / "t.safetensors")
    assert CaptionTraining.load(tmp_path / "t.safetensors").to_frame().equals(training.to_frame())
    pretrained = sparse_captioner(tmp_path / "captioner" / "language_model", words, D)
    assert torch.equal(pretrained.language_model.lm_head.weight, captioner.language_model.lm_head.weight)
    live = sparse_captioner(captioner.language_model, words, D)
    assert live.language_model is captioner.language_model
    with pytest.raises(LoadError, match="could not be loaded"):
        sparse_captioner(str(tmp_path / "nothing"), words, D)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "captioner" / "language_model" / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "mlp.c_fc.weight" in name)
    save_file({name: value for name, value in weights.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="lacks weights"):
        SparseCaptioner.load(tmp_path / "captioner", words)


def test_a_pretrained_model_is_trained_in_float32(tmp_path: Path) -> None:
    words, folder = WordTokenizer(WORDS), tmp_path / "half"
    captioner_of(seed=2).language_model.bfloat16().save_pretrained(folder)
    found = sparse_captioner(folder, words, D, n_prefix=3, d_hidden=8)
    assert {weight.dtype for weight in found.parameters()} == {torch.float32}
    before = found.language_model.lm_head.weight.clone()
    train(found, adapter_steps=0, joint_steps=5, joint_lr=1e-6)
    assert not torch.equal(found.language_model.lm_head.weight, before)  # bfloat16 would have rounded such steps away
    half = sparse_captioner(folder, words, D, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    half.generate(codes_of(2), max_tokens=3)
    for steps in ({"adapter_steps": 0}, {"adapter_steps": 3, "joint_steps": 0}):
        with pytest.raises(InputError, match=r"is bfloat16, .* dtype=torch\.float32"):
            train(half, **steps)
    mixed = captioner_of()
    mixed.language_model.bfloat16()
    with pytest.raises(InputError, match=r"language_model\..* is bfloat16"):
        train(mixed, adapter_steps=0)
    made = sparse_captioner(config_of(words.vocab_size, dtype=torch.bfloat16), words, D)
    assert {weight.dtype for weight in made.parameters()} == {torch.float32}
    half.save(tmp_path / "again")
    assert next(SparseCaptioner.load(tmp_path / "again", words).parameters()).dtype == torch.float32
    again = SparseCaptioner.load(tmp_path / "again", words, dtype=torch.bfloat16)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in half.state_dict().items())
    with pytest.raises(InputError, match="a live one keeps its own"):
        sparse_captioner(found.language_model, words, D, dtype=torch.float32)


def test_tokenizers() -> None:
    plain = Tokenizer(WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "star": 3}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    found = caption_tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unk>"))
    assert (found.to_ids("a star"), found.to_text([2, 3]), found.end_id, found.n_ids) == ([2, 3], "a star", 0, 4)
    assert caption_tokenizer(found) is found
    assert sparse_captioner(config_of(4), found, D).generate(codes_of(2), max_tokens=2).ended is not None
    with pytest.raises(InputError, match="no end token"):
        caption_tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>"))
    with pytest.raises(InputError, match="a str is no tokenizer"):
        caption_tokenizer("gpt2")


def test_wrong_input() -> None:
    captioner, words = captioner_of(), WordTokenizer(WORDS)
    for change, message in (
        ({"d_code": 0}, "d_code"), ({"n_prefix": 0}, "n_prefix"), ({"d_hidden": 1.5}, "d_hidden"),
        ({"language_model": nn.Linear(2, 2)}, "got a Linear"),
        ({"language_model": config_of(5)}, "9 ids, and the language model embeds 5"),
    ):  # fmt: skip
        given: dict[str, Any] = {"language_model": config_of(9), "tokenizer": words, "d_code": D, **change}
        with pytest.raises(InputError, match=message):
            sparse_captioner(**given)
    for codes, message in ((codes_of(2)[:, 1:], "floats"), (-codes_of(2), "negative"), (codes_of(2).long(), "floats")):
        with pytest.raises(InputError, match=message):
            captioner.generate(codes)
    with pytest.raises(InputError, match="do not fit into the 24 places"):
        captioner.generate(codes_of(2), max_tokens=22)
    for more, message in (
        ({"adapter_steps": 0, "joint_steps": 0}, "at least 1; got 0"), ({"batch_size": 0}, "batch_size"),
        ({"adapter_lr": 0.0}, "learning rates"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"held_out": 1.0}, r"held_out is a share in \[0, 1\)"), ({"held_out": 0.99}, "none is left"),
        ({"stop_after": 0}, "stop_after"), ({"evaluate_every": 0}, "evaluate_every"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train(captioner, **more)
    for captions, message in (
        (CAPTIONS[:3], "as many captions, got 3"), (["a"] * 19 + [" "], "number 19 is ' '"),
        (["a"] * 19 + ["zebra"], "zebra"), (["a"] * 19 + ["a " * 15], "a context of 16"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            train_captioner(captioner, codes_of(20), captions, progress=False)
    with pytest.raises(InputError, match="do not fit into the 8 places"):
        train(captioner_of(n_positions=8))


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.sampled_from(["a", "glass", "glass moth", "kite", "red kite", "river"]), max_size=6).map(" ".join),
    classes=st.sets(st.sampled_from(["glass", "glass moth", "moth", "kite", "red kite", "river red kite"]), min_size=3),
)  # fmt: skip
def test_named_classes_by_a_pattern(text: str, classes: set[str]) -> None:
    pattern = "|".join(rf"\b{name}\b" for name in sorted(classes, key=len, reverse=True))
    assert named_classes(f"{text.capitalize()}.", sorted(classes)) == set(re.findall(pattern, text))


class Trained(NamedTuple):
    captioner: SparseCaptioner
    training: CaptionTraining
    data: SteeringData
    captions: list[str]


@pytest.fixture(scope="module")
def trained(planted_sparse: cle.HookedCLIP) -> Trained:
    world, tokenizer = PlantedWorld(0), planted_sparse.tokenizer
    names = [entry.name for entry in world.unambiguous_classes]
    assert isinstance(tokenizer, WordTokenizer)
    train_on = world.sample(1600, seed=11, split="train", classes=names)
    test = world.sample(48, seed=11, split="test", classes=names)
    with torch.no_grad():
        codes = torch.cat([planted_sparse.embed_images(part) for part in normalise(train_on.images).split(100)])
    config = config_of(tokenizer.vocab_size, n_embd=64)
    captioner = sparse_captioner(config, tokenizer, codes.shape[1], d_hidden=128)
    training = train_captioner(captioner, codes, train_on.captions, joint_steps=350, joint_lr=2e-3, batch_size=64,
                               progress=False)  # fmt: skip
    labels = [names.index(world.classes[int(label)].name) for label in test.labels]
    data = SteeringData.from_clip(planted_sparse, normalise(test.images), labels, names, k=8, progress=False)
    return Trained(captioner, training, data, test.captions)


def test_planted_captions_are_learnt(trained: Trained) -> None:
    assert float(trained.training.held_out_loss[-1]) < float(trained.training.loss[0]) / 2
    found = trained.captioner.generate(trained.data.codes, max_tokens=20)
    assert all(found.ended)
    right = [trained.data.classes[int(label)] in named_classes(text, trained.data.classes)
             for text, label in zip(found.texts, trained.data.labels, strict=True)]  # fmt: skip
    assert sum(right) / len(right) > 0.7
    assert trained.captioner.generate(trained.data.codes, max_tokens=20) == found


def test_steered_captions(trained: Trained, tmp_path: Path) -> None:
    captioner, data, longest = trained.captioner, trained.data, trained.training.longest
    strengths = (1.0, 8.0)
    found = caption_steering(captioner, data, longest=longest, strengths=strengths, n_controls=1, n_bootstrap=100,
                             progress=False)  # fmt: skip
    frame = found.to_frame()
    assert list(frame.arm) == ["as is", "concept", "control", "concept", "control"]
    strong, control = frame.iloc[3], frame.iloc[4]
    assert strong.success > 0.3 > 0.1 > control.success
    assert strong.success_over_control_low > 0.15
    assert strong.kept < 0.35 < control.kept
    for s, strength in enumerate(strengths):
        for arm in range(2):
            for picture in range(len(data.codes)):
                text = found.text(picture, strength, arm=arm)
                names = named_classes(text, data.classes)
                old, new = (data.classes[int(which[picture])] for which in (found.labels, found.new_labels))
                assert bool(found.success[s, arm, picture]) == (new in names and old not in names)
                assert bool(found.kept[s, arm, picture]) == (old in names and new not in names)
                assert bool(found.corrupted[s, arm, picture]) >= (not names or len(text.split()) > longest)
    found.save(tmp_path / "c.safetensors")
    again = CaptionSteering.load(tmp_path / "c.safetensors")
    assert again.texts == found.texts
    assert again.to_frame().equals(frame)
    everything = caption_steering(captioner, data, longest=1, strengths=2.0, n_controls=0, progress=False)
    assert bool(everything.corrupted.all())  # all captions are longer than that
    nothing = caption_steering(captioner, data, longest=longest, strengths=2.0, n_controls=0, named=lambda text: (),
                               progress=False)  # fmt: skip
    assert bool(nothing.corrupted.all())
    assert not bool(nothing.success.any())


def test_wrong_steering(trained: Trained) -> None:
    for change, message in (
        ({"longest": 0}, "longest"), ({"longest": 40}, "too long cannot be told"), ({"strengths": 0.0}, "above zero"),
        ({"named": lambda text: ["zebra"]}, "no classes of the data"), ({"confidence": 2.0}, "confidence"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            caption_steering(trained.captioner, trained.data, **{"longest": 14, "progress": False, **change})
    with pytest.raises(InputError, match="reads codes of 6 features"):
        caption_steering(captioner_of(), trained.data, longest=4)
    with pytest.raises(InputError, match="there are the strengths"):
        caption_steering(trained.captioner, trained.data, longest=14, strengths=2, n_controls=0, progress=False).text(
            0, 3.0
        )
