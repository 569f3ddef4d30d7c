"""Uploaded files, taken for what their content is and not for their name: jobs and pictures."""

from __future__ import annotations

import io
import warnings
from typing import Any

from attn_control.studio.settings import Refused, Settings

SMALLEST = 8  # pixels a side of a reference picture, as `render` has it
_PICTURES = {b"\x89PNG": "a PNG picture", b"\xff\xd8": "a JPEG picture"}
# What a file begins with when it is something else under a new name.
_OTHERS = {
    b"PK": "a zip archive (or a .pt file, which is one)",
    b"\x80": "a pickle, which is never loaded",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF model",
}


def text_of_upload(raw: bytes, settings: Settings) -> str:
    """The text of an uploaded job.

    Raises:
        Refused: at "job": too large, or no text.
    """
    if len(raw) > settings.upload:
        raise Refused(
            "job", f"the file has {len(raw)} bytes, a job for this page at most {settings.upload}"
        )
    video = {b"RIFF": "a WebP picture or a video"}
    _refuse_others("job", raw, {**_PICTURES, **_OTHERS, **video}, "a job as YAML text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("job", f"byte {error.start} is not UTF-8, expected YAML text") from None
    if "\0" in text:
        raise Refused("job", "the file holds null bytes, expected YAML text")
    return text


def picture_of_upload(raw: bytes, settings: Settings) -> Any:
    """An uploaded reference picture as PIL RGB, the right way up; its size is read first.

    Raises:
        Refused: at "picture": too large in bytes or pixels, too small, several pictures in one
            file, or no PNG, JPEG or WebP that can be read.
    """
    from PIL import Image, ImageOps

    if not raw:
        raise Refused("picture", "the file is empty, expected a picture")
    if len(raw) > settings.picture:
        raise Refused(
            "picture",
            f"the file has {len(raw)} bytes, a picture for this page at most {settings.picture}",
        )
    _refuse_others("picture", raw, _OTHERS, "a PNG, JPEG or WebP picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG", "WEBP")) as image:
                _check_size(image.size, settings)
                if getattr(image, "n_frames", 1) > 1:
                    raise Refused("picture", f"the file holds {image.n_frames} pictures, not one")
                picture = ImageOps.exif_transpose(image).convert("RGB")
    except Refused:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refused(
            "picture", f"the picture has too many pixels, this studio allows {settings.pixels}"
        ) from None
    except Exception:  # what a decoder makes of hostile bytes: anything
        raise Refused(
            "picture", "the file cannot be read as a picture, expected PNG, JPEG or WebP"
        ) from None
    return picture


def _check_size(size: tuple[int, int], settings: Settings) -> None:
    width, height = size
    if min(size) < SMALLEST:
        raise Refused(
            "picture", f"the picture has {width} x {height} pixels, expected {SMALLEST} a side"
        )
    if width * height > settings.pixels:
        raise Refused(
            "picture",
            f"the picture has {width} x {height} pixels, this studio allows {settings.pixels}",
        )


def _refuse_others(place: str, raw: bytes, others: dict[bytes, str], expected: str) -> None:
    for start, what in others.items():
        if raw.startswith(start):
            raise Refused(place, f"the file is {what}, expected {expected}")
