"""A language model that is shown a sparse code: what a code says, in a sentence.

`prefix = W_2 gelu(W_1 z + b_1) + b_2`, read as `n_prefix` vectors of the language model's width, which stand where
token embeddings would; the words follow. The code is un-normalised and pooled. The paper puts a two-layer MLP between a
frozen Sparse CLIP and Llama 3.1 8B; whether that reads pooled codes or one of each patch is not stated there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig

from clip_lens_ext.errors import InputError, LoadError
from clip_lens_ext.result_files import read_parts, write_parts
from clip_lens_ext.sparse_clip.caption_tokens import CaptionTokenizer, caption_tokenizer
from clip_lens_ext.sparse_clip.checks import checked_codes, checked_count

_ADAPTER, _LANGUAGE_MODEL, _KIND = "adapter.safetensors", "language_model", "SparseCaptioner"


@dataclass(frozen=True)
class Captions:
    """What a captioner says of some codes.

    Attributes:
        texts: one for each code.
        n_tokens: tokens of each, the end left out.
        ended: whether each came to its end; where not, it was cut.
    """

    texts: tuple[str, ...]
    n_tokens: tuple[int, ...]
    ended: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.texts)


class SparseCaptioner(nn.Module):
    """A two-layer adapter from sparse codes to prefix vectors, and a causal language model.

    `sparse_captioner` makes it.

    Args:
        language_model: a causal language model of transformers, used as it is.
        tokenizer: a `CaptionTokenizer`.
        d_code: features of a code.
        n_prefix: prefix vectors.
        d_hidden: width between the adapter's two layers.
        seed: of the adapter's weights.

    Raises:
        InputError: sizes below 1, or a tokenizer with ids that the language model does not have.
    """

    def __init__(
        self, language_model: nn.Module, tokenizer: CaptionTokenizer, d_code: int, *, n_prefix: int = 4,
        d_hidden: int = 256, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("d_code", d_code), ("n_prefix", n_prefix), ("d_hidden", d_hidden)):
            checked_count(value, name)
        if not hasattr(language_model, "get_input_embeddings") or not hasattr(language_model, "config"):
            kind = type(language_model).__name__
            raise InputError(f"a causal language model of transformers is needed, got a {kind}")
        self.language_model = cast(Any, language_model)
        embedding: Tensor = self.language_model.get_input_embeddings().weight
        if tokenizer.n_ids > len(embedding):
            raise InputError(f"the tokenizer has {tokenizer.n_ids} ids, and the language model embeds {len(embedding)}")
        self.tokenizer, self.d_code, self.n_prefix, self.d_hidden = tokenizer, d_code, n_prefix, d_hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Linear(d_code, d_hidden), nn.Linear(d_hidden, n_prefix * embedding.shape[1])
        self.adapter = nn.Sequential(first, nn.GELU(), last).to(embedding.device, embedding.dtype)

    @property
    def n_positions(self) -> int | None:
        """Vectors that the language model has room for, the prefix included; None where it does not say."""
        return getattr(self.language_model.config, "max_position_embeddings", None)

    def prefix(self, codes: Tensor) -> Tensor:
        """Prefix vectors `[sample n_prefix d_model]` of codes `[sample d_code]`."""
        weight = next(self.adapter.parameters())
        codes = checked_codes(codes, self.d_code).to(weight.device, weight.dtype)
        return self.adapter(codes).unflatten(-1, (self.n_prefix, -1))

    def forward(self, codes: Tensor, ids: Tensor) -> Tensor:
        """Logits `[sample token id]`: those at place `t` are of the token `t`, given the code and the tokens before it.

        Args:
            codes: `[sample d_code]`.
            ids: `[sample token]`; what follows a sample's end is not seen by what stands before it.
        """
        words = self.language_model.get_input_embeddings()(ids[:, :-1])
        seen = torch.cat([self.prefix(codes), words], dim=1)
        return self.language_model(inputs_embeds=seen, use_cache=False).logits[:, self.n_prefix - 1 :]

    def loss(self, codes: Tensor, ids: Tensor, n_tokens: Tensor) -> Tensor:
        """Mean over all tokens of all samples of `-log p(token | code, tokens before it)`, in nats; the end counts.

        Args:
            codes: `[sample d_code]`.
            ids: `[sample token]`, padded at their ends.
            n_tokens: tokens of each with its end, `[sample]`.
        """
        counts = torch.arange(ids.shape[1], device=ids.device) < n_tokens[:, None]
        return F.cross_entropy(self(codes, ids)[counts].float(), ids[counts])

    @torch.no_grad()
    def generate(self, codes: Tensor, *, max_tokens: int = 32, batch_size: int = 64) -> Captions:
        """The caption of each code: at each place the likeliest token, until the end.

        Args:
            codes: un-normalised, `[sample d_code]`; steer them before.
            max_tokens: a caption without an end by then is cut, and said to be.
            batch_size: codes at once.

        Raises:
            InputError: codes that are none or of another width, or more tokens than the language model has room for.
        """
        checked_codes(codes, self.d_code)
        checked_count(batch_size, "batch_size")
        checked_count(max_tokens, "max_tokens")
        if self.n_positions is not None and self.n_prefix + max_tokens > self.n_positions:
            raise InputError(f"{self.n_prefix} prefix vectors and {max_tokens} tokens do not fit into the "
                             f"{self.n_positions} places of the language model")  # fmt: skip
        training = self.training
        self.eval()
        try:
            rows = [row for part in codes.split(batch_size) for row in self._greedy(part, max_tokens)]
        finally:
            self.train(training)
        end = self.tokenizer.end_id
        spoken = [row[: row.index(end)] if end in row else row for row in rows]
        return Captions(
            tuple(self.tokenizer.to_text(row) for row in spoken), tuple(map(len, spoken)),
            tuple(end in row for row in rows),
        )  # fmt: skip

    def _greedy(self, codes: Tensor, max_tokens: int) -> list[list[int]]:
        model, found, past = self.language_model, [], None
        seen = self.prefix(codes)
        ended = torch.zeros(len(codes), dtype=torch.bool, device=seen.device)
        for _ in range(max_tokens):
            out = model(inputs_embeds=seen, past_key_values=past, use_cache=True)
            # A tokenizer may have fewer ids than the model embeds, which pads its table.
            new = out.logits[:, -1, : self.tokenizer.n_ids].argmax(dim=-1)
            found.append(new)
            ended |= new == self.tokenizer.end_id
            if bool(ended.all()):
                break
            past, seen = out.past_key_values, model.get_input_embeddings()(new[:, None])
        return torch.stack(found, dim=1).tolist()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter and language model into a folder; the tokenizer is left to you."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.language_model.save_pretrained(path / _LANGUAGE_MODEL)
        sizes = {"d_code": self.d_code, "n_prefix": self.n_prefix, "d_hidden": self.d_hidden}
        write_parts(path / _ADAPTER, _KIND, self.adapter.state_dict(), sizes, {})

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], tokenizer: Any, *, dtype: torch.dtype = torch.float32
    ) -> SparseCaptioner:
        """Read what `save` wrote, in a dtype.

        Raises:
            LoadError: something is missing or damaged.
        """
        parts = read_parts(Path(folder) / _ADAPTER, _KIND)
        found = cls(_pretrained(Path(folder) / _LANGUAGE_MODEL, dtype), caption_tokenizer(tokenizer), **parts.fields)
        found.adapter.load_state_dict(parts.tensors, strict=True)
        return found.eval()


def sparse_captioner(
    language_model: PreTrainedConfig | str | os.PathLike[str] | nn.Module,
    tokenizer: Any,
    d_code: int,
    *,
    n_prefix: int = 4,
    d_hidden: int = 256,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> SparseCaptioner:
    """A captioner with an untrained adapter: train it with `train_captioner`.

    Args:
        language_model: a config of transformers, whose model starts from random weights (train all of it); the name of
            a pretrained causal language model of Hugging Face or a folder with one, which must be there whole; or a
            live one, which is trained in place.
        tokenizer: the language model's; see `caption_tokenizer` for which are known.
        d_code: features of a code.
        n_prefix: prefix vectors.
        d_hidden: width between the adapter's two layers.
        dtype: of a model that is made or loaded, whatever its file has; None: float32, in which it can be trained. A
            live one keeps its own.
        seed: of all weights that are random; PyTorch's global generator is left alone.

    Returns:
        `SparseCaptioner` in evaluation mode.

    Raises:
        LoadError: a pretrained model that is not there, or lacks weights.
        InputError: sizes below 1, a tokenizer that does not fit the language model, or a dtype for a live one.

    Example:
        >>> from transformers import GPT2Config
        >>> from clip_lens_ext.planted import PlantedWorld, WordTokenizer
        >>> words = WordTokenizer(PlantedWorld(0).vocabulary)
        >>> config = GPT2Config(vocab_size=words.vocab_size, n_positions=32, n_embd=32, n_layer=1, n_head=2)
        >>> captioner = sparse_captioner(config, words, d_code=64)
        >>> captioner.generate(torch.ones(2, 64), max_tokens=3).n_tokens
        (3, 3)

    Reference:
        Qin et al. (2026), Sparse CLIP, arXiv 2601.20075.
    """
    asked = torch.float32 if dtype is None else dtype
    if isinstance(language_model, PreTrainedConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(language_model, dtype=asked)
    elif isinstance(language_model, str | os.PathLike):
        model = _pretrained(language_model, asked)
    elif dtype is not None:
        raise InputError("dtype is of a model that is made or loaded, and a live one keeps its own: leave it out")
    else:
        model = language_model
    return SparseCaptioner(
        model, caption_tokenizer(tokenizer), d_code, n_prefix=n_prefix, d_hidden=d_hidden, seed=seed
    ).eval()


def _pretrained(name: str | os.PathLike[str], dtype: torch.dtype) -> nn.Module:
    # transformers fills what a file lacks with random numbers, and only warns.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model, report = loaded
    except Exception as error:  # transformers, safetensors and the hub each have their own
        raise LoadError(f"{name} could not be loaded as a causal language model: {type(error).__name__}: {error}")\
            from error  # fmt: skip
    finally:
        transformers.logging.set_verbosity(level)
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if wrong:
        raise LoadError(f"{name} lacks weights of a {type(model).__name__}, or has others: {', '.join(wrong[:5])}")
    return model
