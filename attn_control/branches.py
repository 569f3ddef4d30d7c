"""Which row of a denoiser call is of which branch, and who is calling: read off the call stack, the
pipeline and its guider.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from attn_control.errors import AttnControlError
from attn_control.families import (
    COMPONENTS,
    Arguments,
    Family,
    Loop,
    branches_of,
    guiders_of,
    refuse_guiders,
    unwrap,
)


def calling_pipeline(model: nn.Module) -> Any:
    """The pipeline that is calling this denoiser, from the call stack; None in a loop of one's own.

    Pipelines share denoisers (``from_pipe``), attached or not, and only the one that runs has the
    scheduler and the guidance flag of this call.
    """
    model = unwrap(model)
    for owner, _ in _methods():
        # What diffusers' pipelines have and a user's own classes do not.
        if hasattr(type(owner), "components") and hasattr(owner, "scheduler"):
            parts = (getattr(owner, name, None) for name in (*COMPONENTS, "controlnet"))
            if any(part is not None and unwrap(part) is model for part in parts):
                return owner
    return None


def _methods() -> Iterator[tuple[Any, FrameType]]:
    """The running methods of the call stack, innermost first: their object and their frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            yield frame.f_locals.get("self"), frame
        frame = frame.f_back


@dataclass(frozen=True)
class InLoop:
    """Where a language model's pipeline is: the step within a block, the block, the prompt's
    tokens. Blocks are told apart by their numbers, which grow.
    """

    step: int
    block: int
    prompt: int


def in_loop(pipe: Any, loop: Loop | None) -> InLoop | None:
    """Where the running loop of a pipeline is, by the names of its variables; None if it does not
    run: its schedulers do not tell, and some steps have several calls.

    Raises:
        AttnControlError: it runs, and has no such variables.
    """
    if loop is None:
        return None
    running = False
    for owner, frame in _methods():
        if pipe is None or owner is not pipe or frame.f_code.co_name != "__call__":
            continue
        running = True
        found = [frame.f_locals.get(name) for name in (loop.step, loop.block, loop.prompt)]
        if all(type(value) is int for value in found):
            return InLoop(*found)
    if running:
        raise AttnControlError(
            f"{type(pipe).__name__} does not tell where it is: expected numbers in its variables"
            f" {loop.step}, {loop.block} and {loop.prompt}; this release of diffusers is not known"
        )
    return None


def told_to(
    family: Family, arguments: Arguments, loop: InLoop | None
) -> tuple[tuple[str, Hashable], ...]:
    """What a language model's layout is told beside its arguments, by name."""
    facts = {**family.facts(arguments), "prompt_length": None if loop is None else loop.prompt}
    return tuple(facts.items())


def guides_itself(pipe: Any) -> bool:
    """Whether a pipeline runs classifier-free guidance now.

    Many say so only in a local variable of the method that samples. Some have that and an attribute
    too: then the attribute counts if that method reads it.
    """
    name = "do_classifier_free_guidance"
    for owner, frame in _methods():
        code = frame.f_code
        if owner is pipe and "apply_cfg" in code.co_varnames:  # decided anew at each step
            return bool(frame.f_locals.get("apply_cfg", False))
        if owner is pipe and name in code.co_varnames and name not in code.co_names:
            return bool(frame.f_locals.get(name, False))
    return bool(getattr(pipe, name, False))


def learns_variance(pipe: Any) -> bool:
    """Whether the denoiser predicts its variance too, in as many channels more."""
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    return str(config.get("variance_type", "")).startswith("learned")


def _guider_branch(pipe: Any) -> str | None:
    """The branch of this call, if a guider asked for it: loops that have one hold the batch that
    they are at, which names its prediction.
    """
    if not guiders_of(pipe):
        return None
    refuse_guiders(pipe)  # it may have been given since attach
    for _, frame in _methods():
        for value in frame.f_locals.values():
            if type(value).__name__ == "BlockState":
                name = vars(value).get("__guidance_identifier__")
                if name is not None:
                    return _branch_named(name)
    return None


def _branch_named(name: str) -> str:
    """A branch by the name that a pipeline or a guider gives it."""
    name = name.removeprefix("pred_")
    return name if name in ("cond", "uncond") else f"other:{name}"


def branch_by_row(
    pipe: Any, family: Family, arguments: Arguments, context: str | None, rows: int, calls: int
) -> tuple[str, ...]:
    """The branch of each of a call's ``rows`` rows.

    Args:
        pipe: that is calling; None on a bare model.
        context: the name given to diffusers' ``cache_context``, if any.
        calls: of the denoiser at this step so far.

    Raises:
        AttnControlError: the pipeline perturbs the model itself, or its batch cannot be divided.
    """
    if family.cfg == "none":
        return ("cond",) * rows
    driven = _guider_branch(pipe)
    if driven is not None:
        return (driven,) * rows
    if family.cfg.startswith("batched"):
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            raise AttnControlError(
                f"{type(pipe).__name__} already runs its own perturbed rows; use the"
                " plain pipeline with SoftPAG"
            )
        if arguments.get("skip_layers") is not None:
            return ("other:skip_layers",) * rows
        if context not in (None, "cond_uncond"):  # a pipeline's own perturbed forward
            return (f"other:{context}",) * rows
        if not guides_itself(pipe):
            return ("cond",) * rows
        names = ("cond", "uncond") if "cond first" in family.cfg else ("uncond", "cond")
        names = branches_of(pipe) or names
        if rows % len(names):
            expected = "an even batch" if len(names) == 2 else f"a multiple of {len(names)} rows"
            raise AttnControlError(
                f"classifier-free guidance needs {expected}, the denoiser got {rows} rows"
            )
        return tuple(branch for branch in names for _ in range(rows // len(names)))
    if context is not None:
        return (_branch_named(context),) * rows
    return (("cond", "uncond")[calls] if calls < 2 else f"other:{calls}",) * rows
