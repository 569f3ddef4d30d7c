"""What a caption's words mean, as classes: text encoders learn to tell them before they are drawn.

Left to the denoiser's loss alone, an encoder this small stays a bag of words for many thousand
steps ("left of" is drawn as "right of"). Told for each word of an object which colour, shape and
place that object has, it reads a caption in a minute, on captions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES
from attn_control.zoo.textures import parse_textured
from attn_control.zoo.train.common import generator, learning_rate
from attn_control.zoo.videos import DIRECTIONS, parse_video

Kinds = dict[str, tuple[str, ...]]  # what can be told of a word, and its classes
Facts = list[dict[str, str]]  # of a caption: one an object, in the order of mention

# The second object's place, as the first one's relation has it.
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_OPPOSITE |= {"behind": "in front of", "in front of": "behind"}

TEXTURED: Kinds = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "texture": ("plain", "striped", "barred", "checked", "dotted", "reference"),
    "place": ("alone", "and", *list(_OPPOSITE)[:4]),
    "ground": ("unsaid", *BACKGROUNDS),
}
MOVING: Kinds = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": ("still", *DIRECTIONS),
    "place": ("alone", "behind", "in front of"),
    "ground": ("unsaid", *BACKGROUNDS),
}


def textured_facts(caption: str) -> Facts:
    """What a caption of shapes-flux says of each object."""
    spec = parse_textured(caption)
    first = spec.plain.relation or ("and" if len(spec.plain.objects) == 2 else "alone")
    places = (first, _OPPOSITE.get(first, first))
    return [
        {"colour": colour, "shape": shape, "texture": texture or "reference", "place": place,
         "ground": spec.plain.background or "unsaid"}
        for (colour, shape), texture, place in zip(
            spec.plain.objects, spec.textures, places[: len(spec.textures)], strict=True
        )
    ]  # fmt: skip


def moving_facts(caption: str) -> Facts:
    """What a caption of shapes-wan says of each object."""
    spec = parse_video(caption)
    ground, crossing = spec.background or "unsaid", spec.crossing or "alone"
    facts = [(*spec.mover, spec.direction, crossing)]
    if spec.still is not None:
        facts.append((*spec.still, "still", _OPPOSITE[crossing]))
    keys = ("colour", "shape", "motion", "place")
    return [{**dict(zip(keys, fact, strict=True)), "ground": ground} for fact in facts]


@dataclass(frozen=True)
class Reading:
    """The classes of every word: int64 (captions, tokens, kinds), -1 where there is nothing."""

    kinds: Kinds
    classes: torch.Tensor


def read(
    captions: Sequence[str], facts: Callable[[str], Facts], kinds: Kinds, length: int
) -> Reading:
    """Classes for tokenizers of one token a word: those of an object stand at its own words (from
    its "a" to its shape), the background at every word of the caption.
    """
    classes = torch.full((len(captions), length, len(kinds)), -1)
    known: dict[str, torch.Tensor] = {}
    for row, caption in enumerate(captions):
        if caption not in known:
            known[caption] = torch.tensor(_rows(caption, facts(caption), kinds))[:length]
        classes[row, : len(known[caption])] = known[caption]
    return Reading(kinds, classes)


def _rows(caption: str, facts: Facts, kinds: Kinds) -> list[list[int]]:
    """Of each word the class of each kind."""
    words, rows, at, inside = caption.split(), [], 0, False
    for word in words:
        inside = inside or (word == "a" and at < len(facts))
        own = facts[at] if inside else {}
        ground = {"ground": facts[0]["ground"]}
        told = {**own, **ground}
        rows.append([kinds[k].index(told[k]) if k in told else -1 for k in kinds])
        if inside and word in SHAPES:
            at, inside = at + 1, False
    return rows


class Reader(nn.Module):
    """Scores of every class of every kind, read off a text encoder's states."""

    def __init__(self, kinds: Kinds, width: int):
        super().__init__()
        self.sizes = [len(classes) for classes in kinds.values()]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over words and kinds; 0 where nothing is asked, as of a small batch
        whose captions are all dropped.

        states (batch, tokens, width); classes int64 (batch, tokens, kinds), -1 left out.
        """
        scores = self.head(states).float().split(self.sizes, -1)
        losses = [
            F.cross_entropy(
                s.flatten(0, 1), classes[..., i].flatten(), ignore_index=-1, reduction="sum"
            )
            / (classes[..., i] >= 0).sum().clamp(min=1)
            for i, s in enumerate(scores)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def share_right(self, states: torch.Tensor, classes: torch.Tensor) -> float:
        """Of all told classes, the share that the scores put first."""
        scores = self.head(states).split(self.sizes, -1)
        best = torch.stack([s.argmax(-1) for s in scores], -1)
        return float((best == classes)[classes >= 0].float().mean())


def learn(
    encode: Callable[[torch.Tensor], torch.Tensor],
    reader: Reader,
    params: Sequence[nn.Parameter],
    ids: torch.Tensor,
    reading: Reading,
    *,
    steps: int,
    batch: int = 128,
    peak: float = 2e-3,
    seed: int = 1,
) -> float:
    """Teach an encoder on captions alone; the share of classes told right at the last step.

    encode: from token ids (batch, tokens) to states (batch, tokens, width).
    """
    opt = torch.optim.AdamW([*params, *reader.parameters()], lr=peak, betas=(0.9, 0.98))
    right = 0.0
    for step in tqdm(range(steps), desc="reading", mininterval=5):
        at = torch.randint(len(ids), (batch,), generator=generator(seed + 7, step))
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 50)
        states = encode(ids[at])
        loss = reader.loss(states, reading.classes[at])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step + 1 == steps:
            right = reader.share_right(states, reading.classes[at])
    return right
