"""What a row of the table of models says."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from attn_control.call import Site
from attn_control.layouts import Arguments, LayoutOf

EVERY = ("every",)
"""Parts of a processor call that makes one softmax a row: all of them are the main one."""


FEED_FORWARD = (
    "ff", "ff_context", "ff_i", "ff_t", "ffn", "mlp", "img_mlp", "txt_mlp", "feed_forward",
    "down_proj", "act_mlp",
)  # fmt: skip
"""What diffusers calls the feed-forward of a block. The last is that of fused blocks, which project
it together with attention."""


def evenly(steps: int) -> list[float]:
    """Noise levels from 1 down in even steps, before any shift."""
    return [1 - n / steps for n in range(steps)]


@dataclass(frozen=True)
class Loop:
    """Where the loop of a language model's pipeline is: names of its local variables.

    step: within the block of text that is being denoised; block: which that is; prompt: tokens of
    the prompt.
    """

    step: str
    block: str
    prompt: str


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: what people call it.
        denoiser: class name in diffusers.
        blocks: module paths of its blocks, "#" for an index, in execution order.
        slots: attention module's name inside a block -> slot; a name that blocks of two kinds share
            is written out, "path.of.#.name".
        layout: (site, arguments, model) -> Layout of that site's main softmax, or a Softmax for
            each that a processor call makes, or None where the rows of a batch have none in common.
            None instead of a function: the order of tokens is
            not proved, and only controls that need no layout work ("attach-only").
        cfg: "batched" (rows [uncond, cond] in one call), "batched, cond first", "split" (a call
            each, cond first) or "none" (language models: all rows are cond).
        sample: the argument that holds the noisy latents; its first dimension is the batch.
        sigmas: number of steps -> noise levels that its pipelines hand to the scheduler, where they
            do not leave them to it.
        timestep_scale: what pipelines multiply the scheduler's timestep by; None where they turn it
            into something else, so that only the scheduler's own index tells the step.
        row_fields: arguments with a batch dimension, for perturbing the cond rows only; empty: full
            batch.
        by_value: arguments whose values, and not just shapes, decide the layout.
        folded: attention folds frames into the batch or takes rows apart: its rows are others.
        block_returns: the arguments that a block hands on, in the order in which it returns them;
            by path of ``blocks`` where they differ. A block without any cannot be skipped.
        feed_forward: names of the modules inside a block whose output is what its feed-forward
            adds; the same names for most models.
        attention_ends: names of the modules through which attention's output goes before it is
            added, where a norm would undo what happens to it before.
        shared_fields: tensors that all rows share.
        text: the argument that holds the text embedding.
        loop: of a language model, whose attention runs through transformers' attention interface.
        facts: of such a model's arguments what decides a layout beside their shapes: `layout` is
            given it among the arguments, with "prompt_length", None where that is not known.
        parts: slot -> names of the softmax calls that one processor call makes, when not just
            "main"; or ``EVERY``.
    """

    name: str
    denoiser: str
    blocks: tuple[str, ...]
    slots: Mapping[str, str]
    layout: LayoutOf | None
    cfg: str
    block_returns: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    feed_forward: tuple[str, ...] = FEED_FORWARD
    attention_ends: tuple[str, ...] = ()
    sample: str = "hidden_states"
    sigmas: Callable[[int], Sequence[float]] | None = None
    timestep_scale: float | None = 1.0
    row_fields: frozenset[str] = frozenset()
    by_value: frozenset[str] = frozenset()
    folded: bool = False
    shared_fields: frozenset[str] = frozenset()
    text: str = "encoder_hidden_states"
    loop: Loop | None = None
    facts: Callable[[Arguments], Mapping[str, Hashable]] = field(default=lambda arguments: {})
    parts: Callable[[Site], tuple[str, ...]] = field(default=lambda site: ("main",))

    @property
    def language(self) -> bool:
        """Whether it is a language model."""
        return self.loop is not None

    def returned_by(self, block: str) -> tuple[str, ...]:
        """What the block at a module path hands on."""
        if not isinstance(self.block_returns, Mapping):
            return self.block_returns
        return self.block_returns.get(re.sub(r"\.\d+(?=\.|$)", ".#", block), ())
