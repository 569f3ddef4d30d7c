"""What a pipeline made, a picture or the frames of a video, and its files.

Videos become animated PNGs, which lose nothing, or MP4s (H.264), which play everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError

CRF = 16  # of H.264: 0 loses nothing, 23 is the encoder's default, 16 looks the same as the frames


@dataclass(frozen=True)
class VideoFormat:
    """How a video is written: "png" or "mp4", and its frames a second."""

    format: str
    fps: float


@dataclass(frozen=True)
class Made:
    """One picture, or the frames of a video, as PIL RGB."""

    frames: tuple[Any, ...]
    is_video: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = self.frames[0].size
        return width, height

    @property
    def scorable(self) -> Any:
        """What the zoo's scorers take: a picture, or a list of them."""
        return list(self.frames) if self.is_video else self.frames[0]


def made_of(result: Any) -> Made:
    """The first picture or video of what a pipeline's call returned.

    Raises:
        AttnControlError: it holds neither.
    """
    from PIL import Image

    if hasattr(result, "frames"):
        frames = result.frames[0]
        if not isinstance(frames, list):  # pipelines that know no PIL give arrays in [0, 1]
            array = np.asarray(frames)
            if array.dtype != np.uint8:
                array = (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
            frames = [Image.fromarray(frame) for frame in array]
        return Made(tuple(frame.convert("RGB") for frame in frames), is_video=True)
    if hasattr(result, "images"):
        return Made((result.images[0],))
    raise AttnControlError(f"{type(result).__name__} holds neither images nor frames")


def is_blank(made: Made) -> bool:
    """True for a picture of one single colour, and a video of such: the usual face of a NaN."""
    bands = (frame.convert("RGB").getextrema() for frame in made.frames)
    return all(low == high for each in bands for low, high in each)


def check_encoder() -> None:
    """Refuse mp4 where no ffmpeg is found, before anything is rendered."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise AttnControlError(
            f"mp4 needs ffmpeg, which is missing ({error}): `pip install imageio[ffmpeg]`, or "
            "write 'format: png'"
        ) from None


def write_png(made: Made, path: Path, info: Any, fps: float | None) -> None:
    """Write a PNG with text chunks; a video as an animated one that repeats for ever."""
    first, *rest = made.frames
    if not made.is_video:
        first.save(path, format="PNG", pnginfo=info)
        return
    # Pillow joins a frame to an equal one before it, unless the two are blended in different ways:
    # for opaque frames both ways are the same.
    blend = [number % 2 for number in range(len(made.frames))]
    first.save(
        path, format="PNG", pnginfo=info, save_all=True, append_images=rest, loop=0,
        duration=1000 / (fps or 1), blend=blend,
    )  # fmt: skip


def write_mp4(made: Made, path: Path, fps: float) -> None:
    """Write H.264 in an MP4; sizes are even, or it is an AttnControlError."""
    import imageio_ffmpeg

    width, height = made.size
    if width % 2 or height % 2:
        raise AttnControlError(
            f"mp4 needs an even width and height, got {width} x {height}; write 'format: png'"
        )
    writer = imageio_ffmpeg.write_frames(
        str(path), made.size, fps=fps, codec="libx264", quality=None, macro_block_size=2,
        ffmpeg_log_level="error",
        # The file has a temporary name, which does not tell its kind.
        output_params=["-crf", str(CRF), "-movflags", "+faststart", "-f", "mp4"],
    )  # fmt: skip
    try:
        writer.send(None)
        for frame in made.frames:
            writer.send(frame.tobytes())
    finally:
        writer.close()


def read_media(path: Path, pick: Callable[[int], Sequence[int]] | None = None) -> list[Any]:
    """The frames of a file as PIL RGB; a picture is one frame.

    pick: which of so many frames to read; None: all.
    """
    return list((_mp4_frames if path.suffix == ".mp4" else _png_frames)(path, pick))


def ends_and_middle(count: int) -> list[int]:
    """The first, the middle and the last of so many frames."""
    return sorted({0, count // 2, count - 1})


def _png_frames(path: Path, pick: Callable[[int], Sequence[int]] | None) -> Iterator[Any]:
    from PIL import Image

    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        for number in range(count) if pick is None else pick(count):
            image.seek(number)
            yield image.convert("RGB")


def _mp4_frames(path: Path, pick: Callable[[int], Sequence[int]] | None) -> Iterator[Any]:
    import imageio_ffmpeg
    from PIL import Image

    wanted = None
    if pick is not None:
        wanted = set(pick(imageio_ffmpeg.count_frames_and_secs(str(path))[0]))
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    for number, data in enumerate(reader):
        if wanted is None or number in wanted:
            yield Image.frombytes("RGB", size, data)


def mean_over_frames(
    function: Callable[[Any, Any], float], first: Sequence[Any], second: Sequence[Any]
) -> float:
    """The mean of a measure of two pictures over the frames of two videos."""
    if len(first) != len(second):
        raise AttnControlError(
            f"a video of {len(first)} frames cannot be held against one of {len(second)}"
        )
    return float(np.mean([function(a, b) for a, b in zip(first, second, strict=True)]))
