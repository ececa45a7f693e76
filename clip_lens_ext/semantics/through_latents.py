"""The part of a change of the prediction that goes through single latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.saes.decoder import check_decoder, check_reconstructs, decoder_rows, output_scale
from clip_lens_ext.towers.pooled_tail import can_run_pooled, run_pooled
from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower


def cosines(embedding: Tensor, vectors: Tensor) -> Tensor:
    """Cosines `[sample text]` with unit vectors `[text d_embed]`; in float32 where embeddings are of half precision."""
    # A change is a difference of two of them, of which three digits would leave nothing.
    embedding = embedding if embedding.dtype == torch.float64 else embedding.float()
    return F.normalize(embedding, dim=-1) @ vectors.to(embedding.dtype).T


def tail(tower: HookedTower, hook_name: str, activation: Tensor) -> Tensor:
    """The embedding from the activation at a hook; of the last block at the pooled token alone, where that is all."""
    if can_run_pooled(tower, hook_name):
        return run_pooled(tower, hook_name, activation)
    return tower.run_from(hook_name, activation)


class Through(NamedTuple):
    """One latent's part of the change that an edit makes to one prompt's prediction."""

    row: int
    prompt: int
    latent: int
    change: float
    error: float


def through_latents(
    tower: HookedTower,
    sae: SAE,
    before: Tensor,
    after: Tensor,
    vectors: Tensor,
    *,
    hook_name: str,
    token_scope: TokenScope | None,
    n_latents: int,
    batch_size: int,
    row: int,
    prompts: list[int],
) -> list[Through]:
    """Put single latents back to what they were before the edit, and see how far the prediction goes back.

    `mean_x (y(after x) - y(after x, z_j as before))`, with the error term of the picture after the edit: positive where
    the latent carries a rise. The latents are those of the greatest absolute first-order estimate
    `sum_tokens (z_after - z_before)_j * dy/dz_j`.

    Args:
        tower: the vision tower.
        sae: its SAE.
        before, after: activations of the pairs at the hook, `[pair token d_model]` or `[pair d]`.
        vectors: of the prompts, of unit length, `[prompt d_embed]`.
        hook_name, token_scope: where the SAE reads.
        n_latents: how many latents for each prompt.
        batch_size: pairs in a batch.
        row, prompts: numbers that go into the result.
    """
    batches = list(zip(before.split(batch_size), after.split(batch_size), strict=True))

    def pairs() -> Iterator[_Pair]:
        for first, second in batches:
            yield _Pair(tower, sae, first, second, hook_name, token_scope)

    # A single batch is held; of several, only one is held at a time, and encoded twice: dense latents are wide.
    source = list(pairs()) if len(batches) == 1 else None
    mean = torch.cat([pair.first_order(vectors) for pair in source or pairs()], dim=1).mean(dim=1)
    tried = [[int(j) for j in line.abs().topk(min(n_latents, len(line))).indices if line[j] != 0] for line in mean]
    parts: dict[tuple[int, int], list[Tensor]] = {}
    latents = sorted({j for line in tried for j in line})
    for pair in (source or pairs()) if latents else ():
        for latent in latents:
            change = pair.put_back(latent, vectors)
            for place, line in enumerate(tried):
                if latent in line:
                    parts.setdefault((place, latent), []).append(change[:, place])
    found = []
    for (place, latent), changes in sorted(parts.items()):
        all_pairs = torch.cat(changes)
        error = float(all_pairs.std() / len(all_pairs) ** 0.5)
        found.append(Through(row, prompts[place], latent, float(all_pairs.mean()), error))
    return found


class _Pair:
    """A batch of pairs at the SAE's hook."""

    def __init__(
        self, tower: HookedTower, sae: SAE, before: Tensor, after: Tensor, hook_name: str, scope: TokenScope | None
    ) -> None:
        check_reconstructs(sae)
        self.tower, self.sae, self.hook_name = tower, sae, hook_name
        self.prediction: Tensor | None = None
        cfg = tower.cfg
        with torch.no_grad():
            old, self.activation = before.to(cfg.device), after.to(cfg.device)
            self.positions = TokenPositions(scope or default_scope(old), None, tower.n_prefix)
            self.old = sae.encode(self.positions.take(old))
            taken = self.positions.take(self.activation)
            self.new = sae.encode(taken)
            rows = taken.flatten(0, -2)
            active = (self.new != self.old).flatten(0, -2).any(dim=0).nonzero().flatten()
            if len(active):
                check_decoder(sae, rows[:1], active)
            # x_hat moves by scale * dz_j * D_j: decoding all latents again for each one would take most of the time.
            self.scale = output_scale(sae, rows.to(sae.dtype)).reshape(*taken.shape[:-1], 1)

    def _predict(self, activation: Tensor, vectors: Tensor) -> Tensor:
        return cosines(tail(self.tower, self.hook_name, activation), vectors)

    def first_order(self, vectors: Tensor) -> Tensor:
        """`[prompt pair d_sae]`."""
        found = []
        decoder = decoder_rows(self.sae, torch.arange(self.sae.cfg.d_sae, device=self.new.device)).detach()
        with torch.enable_grad():
            activation = self.activation.detach().requires_grad_()
            predictions = self._predict(activation, vectors)
            self.prediction = predictions.detach()  # of the untouched pair: `put_back` compares every latent with it
            prediction = predictions.sum(dim=0)
            for place in range(len(vectors)):
                (gradient,) = torch.autograd.grad(prediction[place], activation, retain_graph=True)
                at_tokens = self.positions.take(gradient)
                through = (at_tokens.to(decoder.dtype) * self.scale) @ decoder.T
                effect = (self.new - self.old) * through
                found.append((effect.sum(dim=1) if effect.dim() == 3 else effect).double().cpu())
        return torch.stack(found)

    @torch.no_grad()
    def put_back(self, latent: int, vectors: Tensor) -> Tensor:
        """What the prediction loses when one latent is as it was before, `[pair prompt]`."""
        moved = (self.old - self.new)[..., latent, None] * self.scale * decoder_rows(self.sae, torch.tensor([latent]))
        taken = self.positions.take(self.activation)
        activation = self.positions.put(self.activation, taken + moved.to(taken.dtype))
        if self.prediction is None:
            self.prediction = self._predict(self.activation, vectors)
        return (self.prediction - self._predict(activation, vectors)).double().cpu()
