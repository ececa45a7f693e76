"""SAELens' calls on a tower: attach SAEs, run with them, and put everything back exactly as it was.

What an attached SAE does to an activation is `saes/splice.py`'s business; the towers import without sae_lens, and
`clip_lens_ext.saes` registers its splice here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint, LensHandle

from clip_lens_ext.errors import ClipLensError, HookNameError, InputError

if TYPE_CHECKING:
    from sae_lens import SAE


class Splice(Protocol):
    """An SAE as it sits at a hook: it replaces the activation and has hook points of its own."""

    sae: SAE
    hook_name: str
    hook_points: dict[str, HookPoint]

    def __call__(self, activation: Tensor, eot: Tensor | None) -> Tensor:
        """The activation that goes on, of the same shape."""


_make_splice: Callable[..., Splice] | None = None


def register_splice(make: Callable[..., Splice]) -> None:
    """Say what `add_sae` attaches: called once by `clip_lens_ext.saes`."""
    global _make_splice
    _make_splice = make


def _splice_maker() -> Callable[..., Splice]:
    if _make_splice is None:
        try:
            import_module("clip_lens_ext.saes")  # it registers; the layers below know nothing of it
        except ImportError as error:
            raise ClipLensError(f"SAEs need sae_lens, which does not import: {error}") from error
    assert _make_splice is not None  # clip_lens_ext.saes has registered it
    return _make_splice


@dataclass(eq=False)
class _Attached:
    """A splice, and the names and hooks that the SAE's hook points had before."""

    splice: Splice
    former_names: dict[str, str | None] = field(default_factory=dict)
    former_hooks: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.former_hooks = {id(handle) for handle, _ in self._handles()}

    def drop_new_hooks(self) -> None:
        """Take away what was put on the SAE's hook points while it was attached."""
        for handle, listed in self._handles():
            if id(handle) not in self.former_hooks:
                handle.hook.remove()
                listed.remove(handle)

    def _handles(self) -> list[tuple[LensHandle, list[LensHandle]]]:
        lists = [hooks for point in self.splice.hook_points.values() for hooks in (point.fwd_hooks, point.bwd_hooks)]
        return [(handle, hooks) for hooks in lists for handle in hooks]


class _Slot:
    """The forward hook of a hook point that an SAE is attached to; another SAE in its place keeps the order of hooks.

    An object and no closure, so that a copied tower gets slots that belong to the copy.
    """

    def __init__(self, tower: SAECalls, point: nn.Module) -> None:
        self.tower = tower
        self.attached: _Attached | None = None
        self.handle = point.register_forward_hook(self)

    def __call__(self, point: nn.Module, inputs: tuple[Tensor, ...], activation: Tensor) -> Tensor | None:
        if self.attached is None:
            return None
        return self.attached.splice(activation, self.tower.eot_positions(self.tower._tokens))


class SAECalls(HookedRootModule):
    """`add_sae`, `reset_saes`, `saes`, `run_with_saes`, ... with SAELens' names and cached keys.

    Differences from SAELens, each on purpose: the error term is kept unless told otherwise; an unknown hook raises; the
    hook point stays where it is with its permanent hooks, and `tower.reset_saes()` restores it exactly; hooks put on it
    before the SAE see the SAE's input, later ones its output.
    """

    eot_positions: Callable[[Tensor | None], Tensor | None]
    _tokens: Tensor | None

    @property
    def _slots(self) -> dict[str, _Slot]:
        return self.__dict__.setdefault("_sae_slots", {})

    @property
    def _attached(self) -> dict[str, _Attached]:
        return {name: slot.attached for name, slot in self._slots.items() if slot.attached is not None}

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The attached SAEs by hook name."""
        return {name: attached.splice.sae for name, attached in self._attached.items()}

    def add_sae(
        self,
        sae: SAE,
        use_error_term: bool | None = None,
        *,
        hook_name: str | None = None,
        token_scope: str | None = None,
        straight_through: bool | None = None,
    ) -> None:
        """Attach an SAE at its hook until `reset_saes`; one that is already there is replaced.

        Args:
            sae: its `cfg.metadata` says `hook_name` and `token_scope`.
            use_error_term: keep what the SAE does not reconstruct, held constant, so that the tower predicts what it
                does without the SAE. None means True.
            hook_name: instead of the SAE's own.
            token_scope: `"cls"`, `"patches"`, `"all"`, `"eot"` or `"pooled"`, instead of the SAE's own.
            straight_through: pass the gradient that goes further upstream by the SAE unchanged, as if it were not
                there. None means: where the error term is kept.

        Raises:
            HookNameError: the tower has no such hook.
            InputError: the SAE's width does not fit the hook, or it is attached elsewhere.
        """
        splice = _splice_maker()(
            self,
            sae,
            use_error_term=use_error_term,
            hook_name=hook_name,
            token_scope=token_scope,
            straight_through=straight_through,
        )
        elsewhere = [name for name, other in self._attached.items() if other.splice.sae is sae]
        if elsewhere and elsewhere != [splice.hook_name]:
            raise InputError(f"this SAE is attached at {elsewhere[0]} already; one SAE has one set of hook points")
        self._attach(splice.hook_name, _Attached(splice))

    def _attach(self, hook_name: str, attached: _Attached) -> None:
        slot = self._slots.get(hook_name)
        if slot is None:
            slot = self._slots[hook_name] = _Slot(self, self.hook_dict[hook_name])
        self._forget_hook_points(hook_name)
        slot.attached = attached
        for short_name, point in attached.splice.hook_points.items():
            full_name = f"{hook_name}.{short_name}"
            attached.former_names[short_name] = point.name
            point.name = full_name
            self.hook_dict[full_name] = self.mod_dict[full_name] = point

    def _detach(self, hook_name: str) -> None:
        self._attached[hook_name].drop_new_hooks()
        self._forget_hook_points(hook_name)
        self._slots.pop(hook_name).handle.remove()

    def _forget_hook_points(self, hook_name: str) -> None:
        """Take the hook points of the SAE at a hook out of the tower, and give them their own names back."""
        attached = self._attached.get(hook_name)
        if attached is not None:
            for short_name, point in attached.splice.hook_points.items():
                point.name = attached.former_names[short_name]
                del self.hook_dict[f"{hook_name}.{short_name}"], self.mod_dict[f"{hook_name}.{short_name}"]
            self._slots[hook_name].attached = None

    def reset_saes(self, act_names: str | Iterable[str] | None = None) -> None:
        """Take attached SAEs off: those at the given hooks, or all. Hooks that were put on an SAE's own hook points
        through the tower go with it.

        Raises:
            HookNameError: no SAE is attached at one of the hooks.
        """
        names = (
            list(self._attached)
            if act_names is None
            else [act_names]
            if isinstance(act_names, str)
            else list(act_names)
        )
        for name in names:
            if name not in self._attached:
                raise HookNameError(
                    f"no SAE is attached at {name!r}; attached are: {', '.join(self._attached) or 'none'}"
                )
        for name in names:
            self._detach(name)

    @contextmanager
    def saes(
        self,
        saes: SAE | Iterable[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **settings: Any,
    ) -> Iterator[SAECalls]:
        """A context with SAEs attached; afterwards the tower has exactly the SAEs that it had before.

        Args:
            saes: one SAE or several, at different hooks.
            reset_saes_end: with False the SAEs stay attached.
            use_error_term: as in `add_sae`.
            **settings: `hook_name`, `token_scope`, `straight_through` as in `add_sae`.
        """
        before = self._attached
        wanted = [saes] if isinstance(saes, nn.Module) else list(saes)  # an SAE is iterable: it yields its config too
        try:
            for sae in wanted:
                self.add_sae(sae, use_error_term, **settings)
            yield self
        except BaseException:
            self._restore(before)  # an error inside must not leave SAEs behind, whatever reset_saes_end says
            raise
        else:
            if reset_saes_end:
                self._restore(before)

    def _restore(self, before: dict[str, _Attached]) -> None:
        for name in [name for name in self._attached if name not in before]:
            self._detach(name)
        for name, attached in before.items():
            now = self._attached.get(name)
            if now is not attached:
                if now is not None:
                    now.drop_new_hooks()
                self._attach(name, attached)

    def run_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Iterable[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """`tower(*model_args)` with SAEs attached for this pass."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Iterable[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache | dict[str, Tensor]]:
        """`run_with_cache` with SAEs attached for this pass.

        The cache has SAELens' keys: `blocks.L.hook_resid_post.hook_sae_{input,acts_pre,acts_post,recons,error,output}`,
        with the token axis of the SAE's scope: `hook_sae_acts_post` is `[batch token d_sae]`, one token for a CLS SAE.
        """
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_cache(*model_args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Iterable[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`run_with_hooks` with SAEs attached for this pass; their hooks can be named too."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_hooks(*model_args, **kwargs)
