"""The captions of some pictures: equal texts once, and which of them belong to which picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lens_ext.errors import InputError


@dataclass(frozen=True, eq=False)
class PairedCaptions:
    """Texts without repeats, and those of each picture.

    Attributes:
        texts: distinct captions, in the order in which they first come.
        entries: numbers of texts, those of the first picture first, `[caption]`.
        first: where the captions of each picture begin among them, and their end, `[n + 1]`.
    """

    texts: tuple[str, ...]
    entries: Tensor
    first: Tensor

    @classmethod
    def of(cls, captions: Sequence[str | Sequence[str]]) -> PairedCaptions:
        """From a text, or several, for each picture.

        Raises:
            InputError: no captions, a picture without one, or something that is no text; it says at which picture.

        Example:
            >>> found = PairedCaptions.of(["a cat", ["a dog", "a cat"]])
            >>> found.texts, found.entries.tolist(), found.first.tolist()
            (('a cat', 'a dog'), [0, 1, 0], [0, 1, 3])
        """
        if isinstance(captions, str) or not len(captions):
            raise InputError("captions are a sequence with a text, or several, for each picture; got "
                             f"{'one text' if isinstance(captions, str) else 'none'}")  # fmt: skip
        number: dict[str, int] = {}
        entries: list[int] = []
        first = [0]
        for picture, given in enumerate(captions):
            own = [given] if isinstance(given, str) else list(given)
            wrong = [type(text).__name__ for text in own if not isinstance(text, str)]
            if wrong or not own:
                raise InputError(f"picture {picture} has {f'a caption of type {wrong[0]}' if wrong else 'no caption'}: "
                                 "leave it out, or give it a text")  # fmt: skip
            entries += [number.setdefault(text, len(number)) for text in own]
            first.append(len(entries))
        return cls(tuple(number), torch.tensor(entries), torch.tensor(first))

    @property
    def n(self) -> int:
        """Pictures."""
        return len(self.first) - 1

    def select(self, pictures: Tensor) -> PairedCaptions:
        """Those of some pictures, in that order; the texts stay all."""
        begin, end = self.first[pictures], self.first[pictures + 1]
        entries = [self.entries[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        first = torch.cat([torch.zeros(1, dtype=torch.long), (end - begin).cumsum(0)])
        return PairedCaptions(self.texts, torch.cat(entries), first)

    def draw(self, pictures: Tensor, draws: Tensor) -> Tensor:
        """The number of one text of each picture: the one at `draws`, in [0, 1), of its captions."""
        begin, end = self.first[pictures], self.first[pictures + 1]
        return self.entries[begin + (draws * (end - begin)).long()]


def order_of(n: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """A permutation of `n` pictures, and a number in [0, 1) for each that chooses its caption.

    A pure function of seed and epoch, so that a run that was cut short goes on with the same batches, and each process
    of several finds its own share.
    """
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator), torch.rand(n, generator=generator, dtype=torch.float64)
