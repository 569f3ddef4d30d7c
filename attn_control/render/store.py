"""Where results lie: picture files with their settings inside, and one line of results a picture.

A picture is written under a temporary name and then renamed, so that a file with its final name is
always whole. It carries everything that its line in results.jsonl says; a line that was lost when
the power went is rebuilt from the picture. Of a PNG the record is a text chunk, of an MP4 its last
box, which players pass over.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.media import Made, VideoFormat, write_mp4, write_png

KEY = "attn_control"
# ISO/IEC 14496-12: a box of type `uuid` is anyone's own, and begins with the 16 bytes of its name.
_BOX = uuid.uuid5(uuid.NAMESPACE_URL, "attn-control/render/record").bytes


def slug(text: str, length: int) -> str:
    """Lower-case letters and digits joined by dashes, safe in a file name anywhere."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain[:length].strip("-") or "x"


def file_name(prompt: str, seed: int, variant: str, digest: str, suffix: str = "png") -> str:
    """The same settings give the same name; other settings never overwrite it (the digest)."""
    return f"{slug(prompt, 48)}-s{seed}-{slug(variant, 24)}-{digest[:10]}.{suffix}"


def save(made: Made, path: Path, record: dict[str, Any], video: VideoFormat | None = None) -> None:
    """Write a picture or a video with its record inside, whole or not at all."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str)
    if video is not None and video.format == "mp4":
        replace_file(path, lambda temporary: _save_mp4(made, temporary, video.fps, text))
        return
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    info.add_itxt("parameters", parameters_text(record))
    fps = None if video is None else video.fps
    replace_file(path, lambda temporary: write_png(made, temporary, info, fps))


def _save_mp4(made: Made, path: Path, fps: float, record: str) -> None:
    write_mp4(made, path, fps)
    body = _BOX + record.encode()
    with open(path, "ab") as file:
        file.write(struct.pack(">I4s", 8 + len(body), b"uuid") + body)


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
        "Frames": record.get("frames"),
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
    """The record inside a file of ours; None where there is none or the file is damaged."""
    try:
        text = _mp4_record(path) if path.suffix == ".mp4" else _png_record(path)
        record = json.loads(text)
    except (OSError, EOFError, SyntaxError, ValueError, LookupError, AttributeError, struct.error):
        return None
    return record if isinstance(record, dict) else None


def _png_record(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
        return str(image.text[KEY])  # type: ignore[attr-defined]


def _mp4_record(path: Path) -> str:
    """The last box: where it is whole, so is all that was written before it."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        at, found = 0, b""
        while at < end:
            file.seek(at)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:  # media over 4 GB
                (size,) = struct.unpack(">Q", file.read(8))
            if size < 8 or at + size > end:
                raise ValueError("a box is cut off")
            if kind == b"uuid" and file.read(16) == _BOX:
                found = file.read(size - 24)
            at += size
    return found.decode()


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
