"""Where results lie: picture files with their settings inside, and one line of results a picture.

A picture is written under a temporary name and then renamed, so that a file with its final name is
always whole. It carries everything that its line in results.jsonl says; a line that was lost when
the power went is rebuilt from the picture.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError

KEY = "attn_control"


def slug(text: str, length: int) -> str:
    """Lower-case letters and digits joined by dashes, safe in a file name anywhere."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain[:length].strip("-") or "x"


def file_name(prompt: str, seed: int, variant: str, digest: str) -> str:
    """The same settings give the same name; other settings never overwrite it (the digest)."""
    return f"{slug(prompt, 48)}-s{seed}-{slug(variant, 24)}-{digest[:10]}.png"


def save_picture(image: Any, path: Path, record: dict[str, Any]) -> None:
    """Write a PNG with its record as metadata, whole or not at all."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False, allow_nan=False, default=str))
    info.add_itxt("parameters", parameters_text(record))
    replace_file(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name[-80:]}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _disk_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def parameters_text(record: dict[str, Any]) -> str:
    """The settings in the form that picture browsers read: prompt, then `Steps: 28, ...`."""
    settings = record["settings"]
    sampler = settings["sampler"]
    width, height = record.get("size", (sampler.get("width"), sampler.get("height")))
    # A comma or a colon would end a value for the readers of this form.
    controls = " + ".join(_control_text(each) for each in settings["controls"]) or "none"
    pairs = {
        "Steps": record.get("steps"),
        "Sampler": record.get("scheduler"),
        "CFG scale": sampler.get("guidance_scale"),
        "Seed": settings["seed"],
        "Size": f"{width}x{height}",
        "Model": settings["model"]["name"],
        "Attention": f'"{controls}"',
        "Version": f"attn-control {record.get('versions', {}).get('attn-control', '')}".strip(),
    }
    lines = [settings["prompt"]]
    if sampler.get("negative_prompt"):
        lines.append(f"Negative prompt: {sampler['negative_prompt']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _control_text(control: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in control.items() if k != "control")
    return f"{control['control']}({options})".replace('"', "'")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record inside a picture of ours; None where there is none or the file is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            record = json.loads(image.text[KEY])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError):
        return None
    return record if isinstance(record, dict) else None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line; a line that an earlier run left half written is ended first."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())
    except OSError as error:
        raise _disk_error(error, path) from None


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each file name in a results.jsonl; unreadable lines are passed over."""
    return {row["file"]: row for row in _lines(path) if isinstance(row.get("file"), str)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):  # not splitlines: a prompt may hold U+2028
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def make_folder(out: Path) -> Path:
    """Create the folder of the pictures and prove that it can be written."""
    images = out / "images"
    probe = images / f".probe.{os.getpid()}"
    try:
        images.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        raise AttnControlError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}"
        ) from None
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:
            pass
    return images


def _disk_error(error: OSError, path: Path) -> AttnControlError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return AttnControlError(f"the disk is full, {path.name!r} was not written")
    return AttnControlError(f"{str(path)!r} cannot be written: {error.strerror or error}")
