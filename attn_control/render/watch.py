"""Tells someone after each step of a run, who may stop it there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched(pipe: Any, on_step: Callable[[], None] | None) -> Iterator[None]:
    """Have ``on_step`` called after each step of the scheduler; what it raises ends the run.

    By the scheduler's own ``step``, since 30 pipelines of diffusers 0.42 take no
    ``callback_on_step_end`` (PixArt, LongCat-Image, HunyuanVideo 1.5). The method stands on the
    instance meanwhile, and its class shows through again afterwards.
    """
    scheduler = getattr(pipe, "scheduler", None)
    step = getattr(scheduler, "step", None)
    if on_step is None or step is None:
        yield
        return

    @functools.wraps(step)  # pipelines look at its parameters
    def stepped(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        on_step()
        return result

    before = vars(scheduler).get("step")
    scheduler.step = stepped
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
