"""The part of a change of the prediction that goes through single latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from clip_lens_ext.towers.positions import TokenPositions, TokenScope, default_scope
from clip_lens_ext.towers.tower import HookedTower


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
        before, after: the pairs, `[pair 3 height width]`.
        vectors: of the prompts, of unit length, `[prompt d_embed]`.
        hook_name, token_scope: where the SAE reads.
        n_latents: how many latents for each prompt.
        batch_size: pairs in a batch.
        row, prompts: numbers that go into the result.
    """
    estimate: list[Tensor] = []
    batches = list(zip(before.split(batch_size), after.split(batch_size), strict=True))
    for first, second in batches:
        pair = _Pair(tower, sae, first, second, hook_name, token_scope)
        estimate.append(pair.first_order(vectors))
    mean = torch.cat(estimate, dim=1).mean(dim=1)
    tried = [[int(j) for j in line.abs().topk(min(n_latents, len(line))).indices if line[j] != 0] for line in mean]
    parts: dict[tuple[int, int], list[Tensor]] = {}
    for first, second in batches if any(tried) else []:
        pair = _Pair(tower, sae, first, second, hook_name, token_scope)
        for latent in sorted({j for line in tried for j in line}):
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
        self.tower, self.sae, self.hook_name = tower, sae, hook_name
        cfg = tower.cfg
        with torch.no_grad():
            old, self.activation = (tower.run_to(x.to(cfg.device, cfg.dtype), hook_name) for x in (before, after))
            self.positions = TokenPositions(scope or default_scope(old), None, tower.n_prefix)
            self.old = sae.encode(self.positions.take(old))
            # The last to be encoded: an SAE that normalises its input decodes with what it saw last.
            self.new = sae.encode(self.positions.take(self.activation))
            self.decoded = sae.decode(self.new)

    def _predict(self, activation: Tensor, vectors: Tensor) -> Tensor:
        embedding = self.tower.run_from(self.hook_name, activation)
        embedding = embedding if embedding.dtype == torch.float64 else embedding.float()
        return F.normalize(embedding, dim=-1) @ vectors.to(embedding.dtype).T

    def first_order(self, vectors: Tensor) -> Tensor:
        """`[prompt pair d_sae]`."""
        found = []
        with torch.enable_grad():
            activation = self.activation.detach().requires_grad_()
            prediction = self._predict(activation, vectors).sum(dim=0)
            for place in range(len(vectors)):
                (gradient,) = torch.autograd.grad(prediction[place], activation, retain_graph=True)
                at_tokens = self.positions.take(gradient)
                through = at_tokens.to(self.sae.W_dec.dtype) @ self.sae.W_dec.detach().T
                effect = (self.new - self.old) * through
                found.append((effect.sum(dim=1) if effect.dim() == 3 else effect).double().cpu())
        return torch.stack(found)

    @torch.no_grad()
    def put_back(self, latent: int, vectors: Tensor) -> Tensor:
        """What the prediction loses when one latent is as it was before, `[pair prompt]`."""
        edited = self.new.clone()
        edited[..., latent] = self.old[..., latent]
        moved = (self.sae.decode(edited) - self.decoded).to(self.activation.dtype)
        activation = self.positions.put(self.activation, self.positions.take(self.activation) + moved)
        difference = self._predict(self.activation, vectors) - self._predict(activation, vectors)
        return difference.double().cpu()
