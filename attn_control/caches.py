"""diffusers' step caches beside us: what they remember is kept apart for each kind of forward.

A perturbed forward between two of the pipeline's own must neither read their residuals nor leave
its own behind. Most caches know branches (``cache_context``); pyramid attention broadcast and
FasterCache do not, so their state is swapped here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from attn_control.errors import AttnControlError


@dataclass
class _States:
    """The states of one hook, by branch; forgotten whenever the hook's own state is reset."""

    hook: Any
    by_branch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reset = self.hook.reset_state

        def reset_state(module: nn.Module) -> Any:
            self.by_branch.clear()
            return reset(module)

        self.hook.reset_state = reset_state

    def of(self, branch: str, behind: int) -> Any:
        """The branch's state, in step with the hook's own: where that computed, this one will."""
        state = self.by_branch.get(branch)
        if state is None:
            state = self.by_branch[branch] = copy.copy(self.hook.state)
            state.reset()
            state.iteration = max(0, self.hook.state.iteration - behind)
        elif behind:
            state.iteration = max(0, self.hook.state.iteration - behind)
        return state


class StepCaches:
    """The step caches of one denoiser, whenever they were switched on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._states: dict[int, _States] = {}

    def hooks(self) -> list[Any]:
        """Hooks that remember something from one forward to the next."""
        registries = (module.__dict__.get("_diffusers_hook") for module in self._model.modules())
        found = (hook for registry in registries if registry for hook in registry.hooks.values())
        return [hook for hook in found if hook._is_stateful]

    def refuse_halves(self, who: object) -> None:
        """Raises AttnControlError for a control of some rows where FasterCache leaves rows out."""
        if any(_halves(hook) for hook in self.hooks()):
            raise AttnControlError(
                f"{who}: acts on some rows of the batch, but FasterCache leaves the unconditional"
                " ones out of it; switch one of them off"
            )

    @contextlib.contextmanager
    def branch(self, name: str, *, appended: bool = False) -> Iterator[None]:
        """Run forwards of a branch of our own beside the caches.

        Args:
            name: of the branch, behind the name of the caller's context if there is one.
            appended: the forward is the pipeline's own, with more rows; otherwise an extra one that
                follows it.

        Raises:
            AttnControlError: rows are appended to a batch that FasterCache takes for two halves.
        """
        with contextlib.ExitStack() as stack:
            hooks = self.hooks()
            managers = {id(m): m for h in hooks for m in vars(h).values() if _is_manager(m)}
            for manager in managers.values():
                stack.enter_context(_renamed(manager, name, within=appended))
            for hook in hooks:
                if type(hook).__name__.startswith("FasterCache"):
                    if appended and _halves(hook):
                        raise AttnControlError(
                            "FasterCache takes the batch for an unconditional and a conditional"
                            " half, but a control (NAG, or a guide with batched=True) appends rows;"
                            " switch one of them off"
                        )
                    # It reads branches off the size of the batch, so it has no place here.
                    stack.enter_context(_set(hook.fn_ref, "forward", hook.fn_ref.original_forward))
                elif hasattr(getattr(hook, "state", None), "iteration"):
                    states = self._states.get(id(hook)) or _States(hook)
                    self._states[id(hook)] = states
                    state = states.of(name, behind=0 if appended else 1)
                    stack.enter_context(_set(hook, "state", state))
            yield

    def restore(self) -> None:
        """Leave the hooks as they were."""
        for states in self._states.values():
            states.hook.__dict__.pop("reset_state", None)
        self._states.clear()


def _halves(hook: Any) -> bool:
    return type(hook).__name__.startswith("FasterCache") and not hook.is_guidance_distilled


def _is_manager(value: Any) -> bool:
    from diffusers.hooks.hooks import StateManager

    return isinstance(value, StateManager)


@contextlib.contextmanager
def _renamed(manager: Any, name: str, *, within: bool) -> Iterator[None]:
    """Another cache context for the time being. ``cache_context`` itself does not nest."""
    from diffusers.hooks.hooks import CacheContext

    outer = manager._context
    if outer is None:
        context = CacheContext(name)
    else:
        context = replace(outer, name=f"{outer.name}:{name}" if within else name)
    manager.set_context(context)
    try:
        yield
    finally:
        manager.set_context(outer)


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
