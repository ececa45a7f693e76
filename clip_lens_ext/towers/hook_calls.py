"""TransformerLens' hook calls on a tower, with an error wherever TransformerLens would do nothing without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice, SliceInput

from clip_lens_ext.errors import HookNameError, InputError, near

NamesFilter = Callable[[str], bool] | Iterable[str] | str | None


class HookCalls(HookedRootModule):
    """What a tower adds to `HookedRootModule`: names are checked, and caches are `ActivationCache`s."""

    blocks: nn.ModuleList

    def setup(self) -> None:
        """Collect the hook points by name. Native modules get no `name` attribute: they stay as they were."""
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        for name, module in self.named_modules():
            if name == "" or name.split(".")[0] == "native":
                continue
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module

    def hook_names(self) -> list[str]:
        """Every hook name of the tower, with those of the attached SAEs.

        Example:
            >>> import clip_lens_ext as cle
            >>> cle.planted_clip().text.hook_names()[:4]
            ['hook_embed', 'hook_pos_embed', 'hook_full_embed', 'blocks.0.hook_resid_pre']
        """
        return list(self.hook_dict)

    def check_hook_name(self, name: str) -> None:
        """Raise `HookNameError`, with near names, where no hook is called `name`."""
        if name in self.hook_dict:
            return
        n_layers = len(self.blocks)
        parts = str(name).split(".")
        if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= n_layers:
            why = f": this tower has {n_layers} blocks, the last is {n_layers - 1}"
        else:
            why = near(str(name), self.hook_dict)
        raise HookNameError(f"no hook matches {name!r}{why}; see tower.hook_names()")

    def _check_filter(self, names_filter: NamesFilter) -> Callable[[str], bool] | None:
        """The filter as a predicate that matches at least one hook."""
        if names_filter is None:
            return None
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if callable(names_filter):
            if not any(names_filter(name) for name in self.hook_dict):
                raise HookNameError("the filter matches no hook of this tower; see tower.hook_names()")
            return names_filter
        wanted = set(names_filter)
        for name in wanted:
            self.check_hook_name(name)
        if not wanted:
            raise HookNameError("the filter is empty; pass None to take every hook")
        return wanted.__contains__

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a name or a predicate that matches nothing raises `HookNameError`."""
        self._check_filter(name)
        super().add_hook(name, hook, *args, **kwargs)

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        self._check_filter(name)
        super()._enable_hook(name, hook, dir)

    def add_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> dict:
        """As in TransformerLens; a filter that matches nothing raises `HookNameError`."""
        return super().add_caching_hooks(self._check_filter(names_filter), *args, **kwargs)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput | None = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """As in TransformerLens; a filter that matches nothing raises `HookNameError`.

        `pos_slice` cuts the token axis (the query axis of scores and pattern). Pooled vectors have none and stay whole;
        TransformerLens' own would cut their batch axis.
        """
        matches = self._check_filter(names_filter)
        names = [name for name in self.hook_dict if matches is None or matches(name)]
        kept: dict[str, Tensor] = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)

        def save(activation: Tensor, hook: HookPoint, suffix: str = "") -> None:
            value = activation.detach().to(device)
            if value.dim() > 2:
                by_query = str(hook.name).endswith(("hook_attn_scores", "hook_pattern"))
                value = positions.apply(value, dim=2 if by_query else 1)
            kept[f"{hook.name}{suffix}"] = value[0] if remove_batch_dim else value

        forward = [(name, save) for name in names]
        backward = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
        return kept, forward, backward

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ActivationCache | dict[str, Tensor]]:
        """The embedding and a cache of activations, as `HookedTransformer.run_with_cache` gives them.

        Args:
            *model_args: the tower's input.
            return_cache_object: an `ActivationCache`, or with False a plain dict.
            remove_batch_dim: drop the batch axis; the batch must then be one sample.
            **kwargs: `names_filter`, `device`, `reset_hooks_end`, `clear_contexts`, `pos_slice` as in TransformerLens.

        Raises:
            HookNameError: `names_filter` matches nothing.
            InputError: `incl_bwd`, which calls `backward()` on a scalar: an embedding is none.
        """
        if kwargs.get("incl_bwd"):
            raise InputError(
                "incl_bwd needs a scalar output, and a tower's output is [batch d_embed]: use "
                "tower.hooks(bwd_hooks=...) and call backward() on a number that you make of the embedding"
            )
        if remove_batch_dim and model_args and len(model_args[0]) != 1:
            raise InputError(f"remove_batch_dim needs a batch of one sample, got {len(model_args[0])}")
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
