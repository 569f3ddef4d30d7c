"""The prompts of a job, whichever way it names them, and the reference pictures beside them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import Job, PromptEntry, check_prompts
from attn_control.render.yamlfile import KeyPath, YamlFile

Key = tuple[str, "str | None"]
_SIDES = (8, 16_384)  # pixels that a reference picture may have, as height and width may


@dataclass(frozen=True)
class Reference:
    """A picture that goes in with a prompt: a file, or drawn for a fixed prompt of the zoo.

    `digest` is that of its pixels: the same picture under another name changes no result.
    """

    name: str
    digest: str
    path: Path | None = None
    drawn: tuple[str, int] | None = None  # texture and seed

    def picture(self) -> Any:
        """The picture as PIL RGB."""
        return _open(self.path) if self.path is not None else _drawn(*(self.drawn or ("", 0)))


@dataclass(frozen=True)
class Prompt:
    """A text, perhaps with a picture; `fixed` is its row where it comes from a set of the zoo."""

    text: str
    image: Reference | None = None
    fixed: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def key(self) -> Key:
        """What tells prompts apart, also in a row of results (`key_of`)."""
        return self.text, None if self.image is None else self.image.digest

    def __str__(self) -> str:
        return repr(self.text) + (f" with {self.image.name!r}" if self.image is not None else "")


def key_of(row: Mapping[str, Any]) -> Key:
    """The key of the prompt that a row of results belongs to."""
    return row["prompt"], (row.get("image") or {}).get("digest")


def read_prompts(job: Job, source: YamlFile, base: Path) -> list[Prompt]:
    """The prompts themselves; relative paths are looked up in `base`.

    Raises:
        AttnControlError: a file that is missing or no text, a picture that is missing or none, an
            empty set; with the place in the job.
    """
    wanted = job.prompts
    if wanted.texts is not None:
        prompts = _entries(wanted.texts, source, base)
    elif wanted.zoo is not None:
        prompts = _zoo_prompts(job, wanted.zoo, source)
    else:
        prompts = _file_prompts(wanted.file or "", source, base)
    stop = None if wanted.limit is None else wanted.offset + wanted.limit
    chosen = prompts[wanted.offset : stop]
    if not chosen:
        raise source.error(
            ("prompts",), f"no prompt is left of {len(prompts)} with offset {wanted.offset}"
        )
    from attn_control.zoo.prompts import spread

    return spread(chosen, wanted.spread)


def seeds_of(job: Job, prompts: list[Prompt]) -> dict[Key, list[int]]:
    """The seeds of each prompt: the job's, or the one fixed beside it in its zoo set."""
    if isinstance(job.seeds, list):
        return {prompt.key: job.seeds for prompt in prompts}
    return {prompt.key: [prompt.fixed["seed"]] for prompt in prompts if prompt.fixed is not None}


def _entries(entries: list[PromptEntry], source: YamlFile, base: Path) -> list[Prompt]:
    prompts: dict[Key, Prompt] = {}
    for index, entry in enumerate(entries):
        image = None
        if entry.image is not None:
            at: KeyPath = ("prompts", index, "image")
            path = base / Path(entry.image).expanduser()
            try:
                image = Reference(entry.image, _digest(_open(path)), path)
            except AttnControlError as error:
                raise source.error(at, str(error)) from None
        prompt = Prompt(entry.prompt, image)
        if prompt.key in prompts:
            same = prompts[prompt.key]
            raise source.error(("prompts", index), f"{prompt} shows the same pixels as {same}")
        prompts[prompt.key] = prompt
    return list(prompts.values())


def _open(path: Path) -> Any:
    """A picture file as PIL RGB, the right way up."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # A file of a few bytes may unfold into gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                picture = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise AttnControlError(f"no such picture: {str(path)!r}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise AttnControlError(f"{str(path)!r} has too many pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = "a folder" if path.is_dir() else f"no picture that can be read ({error})"
        raise AttnControlError(f"{str(path)!r} is {reason}; expected PNG, JPEG or WebP") from None
    if frames > 1:
        raise AttnControlError(f"{str(path)!r} holds {frames} frames, expected one picture")
    low, high = _SIDES
    if not (low <= min(picture.size) and max(picture.size) <= high):
        raise AttnControlError(
            f"{str(path)!r} is {picture.width} x {picture.height} pixels, expected {low} to {high} "
            "a side"
        )
    return picture


def _drawn(texture: str, seed: int) -> Any:
    from PIL import Image

    from attn_control.zoo.references import draw_reference

    return Image.fromarray(draw_reference(texture, seed))


def _digest(picture: Any) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _zoo_prompts(job: Job, name: str, source: YamlFile) -> list[Prompt]:
    from attn_control import zoo

    wanted = job.prompts
    try:
        rows = zoo.load_prompts(name)
    except AttnControlError as error:
        raise source.error(("prompts", "zoo"), str(error)) from None
    for key in ("split", "objects"):
        value = getattr(wanted, key)
        known = sorted({row[key] for row in rows})
        if value is not None and value not in known:
            expected = ", ".join(map(repr, known))
            raise source.error(("prompts", key), f"expected one of {expected}, got {value!r}")
        rows = [row for row in rows if value is None or row[key] == value]
    if not rows:
        raise source.error(("prompts",), "no prompt of the set has this split and these objects")
    return [Prompt(row["prompt"], _fixed_reference(row), row) for row in rows]


def _fixed_reference(row: Mapping[str, Any]) -> Reference | None:
    drawn = row.get("reference")
    if not drawn:
        return None
    texture, seed = drawn["texture"], drawn["seed"]
    return Reference(texture, _digest(_drawn(texture, seed)), drawn=(texture, seed))


def _file_prompts(name: str, source: YamlFile, base: Path) -> list[Prompt]:
    path = base / Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise source.error(
            ("prompts",),
            f"no such prompts file: {str(path)!r} (for a single prompt write a list: [{name!r}])",
        ) from None
    except UnicodeDecodeError:
        raise source.error(("prompts",), f"{str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise source.error(("prompts",), f"cannot read {str(path)!r}: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    texts = [line for line in lines if line and not line.startswith("#")]
    try:
        entries = check_prompts([PromptEntry(prompt=line) for line in texts])
    except ValueError as error:
        raise source.error(("prompts",), f"{str(path)!r}: {error}") from None
    return [Prompt(entry.prompt) for entry in entries]
