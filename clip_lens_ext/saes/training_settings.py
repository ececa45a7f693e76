"""The settings of a training run, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from clip_lens_ext.errors import InputError, near
from clip_lens_ext.towers.positions import TOKEN_SCOPES, TokenScope

ARCHITECTURES: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
NORMALIZATIONS = ("expected_average_only_in", "layer_norm", "none")
_NOT_COMPARED = ("memory_limit", "cache_dir", "checkpoint_every", "progress", "preprocess")
_MAY_BE_NONE = ("n_training_tokens", "dead_feature_window", "checkpoint_every")


@dataclass(frozen=True)
class TrainingSettings:
    """The keywords of `train_sae` that do not depend on the hook, as it documents them.

    Raises:
        InputError: a setting is out of range, or `sae_kwargs` names no field of the architecture.
    """

    d_sae: int
    architecture: str = "topk"
    k: int = 32
    token_scope: TokenScope = "all"
    n_training_tokens: int | None = None
    batch_size: int = 4096
    lr: float = 1e-3
    held_out: float = 0.1
    normalize_activations: str = "expected_average_only_in"
    dead_feature_window: int | None = None
    sae_kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_batch_size: int = 32
    buffer_images: int = 512
    memory_limit: int = 2 << 30
    seed: int = 0
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known, hint = ", ".join(ARCHITECTURES), near(str(self.architecture), ARCHITECTURES)
            raise InputError(f"unknown SAE architecture {self.architecture!r}: known are {known}{hint}")
        for name, choice, choices in (
            ("token_scope", self.token_scope, TOKEN_SCOPES),
            ("normalize_activations", self.normalize_activations, NORMALIZATIONS),
        ):
            if choice not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {choice!r}")
        for name in ("d_sae", "k", "batch_size", "image_batch_size", "buffer_images", *_MAY_BE_NONE):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, not {value!r}")
        if self.k > self.d_sae:
            raise InputError(f"k must be at most d_sae = {self.d_sae}, not {self.k}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be an integer, not {self.seed!r}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, not {self.held_out!r}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be positive, not {self.lr!r}")
        if isinstance(self.memory_limit, bool) or not isinstance(self.memory_limit, int) or self.memory_limit < 0:
            raise InputError(f"memory_limit must be a number of bytes, not {self.memory_limit!r}")
        self._check_sae_kwargs()

    def _check_sae_kwargs(self) -> None:
        config = ARCHITECTURES[self.architecture][1]
        ours = {"d_in", "d_sae", "k", "dtype", "device", "metadata", "normalize_activations", "reshape_activations"}
        free = {field.name for field in dataclasses.fields(config)} - ours
        for name in self.sae_kwargs:
            if name not in free:
                raise InputError(f"{name!r} is no field of {config.__name__} that sae_kwargs can set{near(name, free)}")

    @property
    def compared(self) -> dict[str, Any]:
        """The settings by which two runs are the same run, as JSON values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_COMPARED}

    def config_fields(self) -> dict[str, Any]:
        """Fields of SAELens' training config that the architecture decides."""
        fields: dict[str, Any] = {"k": self.k}
        if self.architecture == "jumprelu":
            fields = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(self.k)}
        if self.architecture == "matryoshka":
            halves = [self.d_sae // 2**power for power in (4, 3, 2, 1, 0)]
            # A level with fewer latents than are active would have to reconstruct with all of them.
            fields["matryoshka_widths"] = sorted({width for width in halves if width >= self.k})
        return {**fields, **self.sae_kwargs}

    def n_steps(self, n_rows: int) -> int:
        """Training steps, for `n_rows` rows that there are to train on."""
        if self.n_training_tokens is None:
            return max(1000, math.ceil(10 * n_rows / self.batch_size))
        return math.ceil(self.n_training_tokens / self.batch_size)
