"""The methods by name, for whoever runs several of them; each is called as `method(tower, x, sae, target)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sae_lens import SAE
from torch import Tensor

from clip_lens_ext.attribution.ablation import exact_ablation
from clip_lens_ext.attribution.baselines import activation_energy, random_attribution
from clip_lens_ext.attribution.frozen_norm import frozen_layer_norm
from clip_lens_ext.attribution.gradient_dropping import gradient_dropping
from clip_lens_ext.attribution.integrated import integrated_gradients
from clip_lens_ext.attribution.lens_scores import logit_lens_scores
from clip_lens_ext.attribution.logit_lens import logit_lens
from clip_lens_ext.attribution.patching import attribution_patching
from clip_lens_ext.attribution.results import Attribution
from clip_lens_ext.attribution.targets import Target
from clip_lens_ext.errors import InputError, near
from clip_lens_ext.towers.tower import HookedTower

Method = Callable[..., Attribution | Tensor]


def _lens_of_all_latents(tower: HookedTower, x: Any, sae: SAE, target: Target) -> Tensor:
    return logit_lens_scores(tower, sae, target, hook_name=getattr(x, "hook_name", None))


METHODS: dict[str, Method] = {
    "attribution_patching": attribution_patching,
    "integrated_gradients": partial(integrated_gradients, n_steps=32, progress=False),
    "gradient_dropping": partial(gradient_dropping, progress=False),
    "frozen_layer_norm": frozen_layer_norm,
    "activation_x_logit_lens": partial(logit_lens, times_activation=True),
    "activation_x_logit_lens_frozen_norm": partial(logit_lens, variant="frozen_norm", times_activation=True),
    "activation_x_logit_lens_embedding": partial(logit_lens, variant="embedding", times_activation=True),
    "logit_lens": logit_lens,
    "logit_lens_frozen_norm": partial(logit_lens, variant="frozen_norm"),
    "logit_lens_embedding": partial(logit_lens, variant="embedding"),
    "logit_lens_of_all_latents": _lens_of_all_latents,
    "activation_energy": activation_energy,
    "exact_ablation": exact_ablation,
    "random": random_attribution,
}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: there is none; it lists near names.

    Example:
        >>> find_method("activation_energy").__name__
        'activation_energy'
    """
    if name not in METHODS:
        raise InputError(f"no method {name!r}; there are {', '.join(METHODS)}{near(name, METHODS)}")
    return METHODS[name]
