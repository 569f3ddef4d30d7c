"""The contact sheet: variants across, prompts down, one tile a seed.

Every size derives from the tile, so that a sheet of two variants and one of ten look alike. Where
a scorer judged the picture, a badge says so by shape as well as by colour: a check or a cross. Of a
video its first, middle and last frame stand side by side; a reference picture stands beneath its
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attn_control.render.media import ends_and_middle, read_media
from attn_control.render.prompts import Key, key_of
from attn_control.render.store import replace_file

PAPER, INK, SOFT, LINE = "#ffffff", "#1b1f24", "#6b7380", "#e3e6ea"
RIGHT, WRONG = "#1a7f37", "#c4314b"
WIDEST = 1920  # pixels that the tiles of one row may take together
ROWS_A_PAGE = 24


@dataclass(frozen=True)
class Look:
    """Sizes in pixels, all from the tile; a cell holds `span` tiles, the frames of a video."""

    tile: int
    span: int
    gap: int
    group: int
    margin: int
    caption: int
    text: int
    small: int
    title: int

    @classmethod
    def of(cls, columns: int, seeds: int, span: int = 1) -> Look:
        """The largest tile with which a row still fits, between 96 and 320 pixels."""
        tile = max(96, min(320, (WIDEST // (columns * seeds * span)) // 8 * 8))
        return cls(
            tile=tile,
            span=span,
            gap=max(4, tile // 32),
            group=max(20, tile // 7),
            margin=max(40, tile // 4),
            caption=300,
            text=22,
            small=18,
            title=34,
        )

    @property
    def wide(self) -> int:
        """The width of a cell."""
        return self.span * self.tile


def make_sheets(
    rows: Sequence[dict[str, Any]],
    out: Path,
    *,
    variants: Sequence[str],
    seeds: Mapping[Key, Sequence[int]],
    title: str,
    subtitle: str = "",
    notes: dict[str, str] | None = None,
    references: Mapping[Key, Callable[[], Any]] | None = None,
) -> list[Path]:
    """Draw the sheet of a job into `out`: sheet.png, or sheet-01.png and on when it is long.

    Args:
        rows: results, each with file, variant, prompt, seed and score; missing ones stay empty.
        seeds: those of each prompt; the prompts go down the sheet in this order.
        notes: a line below a variant's name.
        references: the picture of each prompt that has one.

    Returns:
        The files, in order; those of an earlier, longer sheet are removed.
    """
    cells = {(row["variant"], key_of(row), row["seed"]): row for row in rows}
    prompts = list(seeds)
    pages = [prompts[i : i + ROWS_A_PAGE] for i in range(0, len(prompts), ROWS_A_PAGE)]
    old = set(out.glob("sheet.png")) | set(out.glob("sheet-[0-9]*.png"))
    paths = []
    for number, page in enumerate(pages, start=1):
        of = f"page {number} of {len(pages)}" if len(pages) > 1 else ""
        sheet = draw_sheet(
            cells,
            out / "images",
            variants,
            page,
            seeds,
            title,
            "   ".join(part for part in (subtitle, of) if part),
            notes or {},
            references or {},
        )
        path = out / ("sheet.png" if len(pages) == 1 else f"sheet-{number:02d}.png")
        replace_file(path, partial(sheet.save, format="PNG"))
        paths.append(path)
    for path in old - set(paths):
        path.unlink(missing_ok=True)
    return paths


def draw_sheet(
    cells: dict[tuple[str, Key, int], dict[str, Any]],
    images: Path,
    variants: Sequence[str],
    prompts: Sequence[Key],
    seeds: Mapping[Key, Sequence[int]],
    title: str,
    subtitle: str,
    notes: dict[str, str],
    references: Mapping[Key, Callable[[], Any]],
) -> Any:
    """One page as a PIL image."""
    from PIL import Image, ImageDraw

    most = max(len(seeds[prompt]) for prompt in prompts)
    span = 3 if any(row.get("frames") for row in cells.values()) else 1
    look = Look.of(len(variants), most, span)
    block = most * look.wide + (most - 1) * look.gap
    width = 2 * look.margin + look.caption + len(variants) * (block + look.group) - look.group
    names = [wrap(name, look.text, block, bold=True) for name in variants]
    notes_wrapped = [wrap(notes.get(name, ""), look.small, block) for name in variants]
    head = max(
        line_height(look.text) * len(name) + line_height(look.small) * len(note)
        for name, note in zip(names, notes_wrapped, strict=True)
    )
    subtitles = wrap(subtitle, look.small, width - 2 * look.margin)
    top = look.margin + line_height(look.title) + line_height(look.small) * len(subtitles)
    grid = top + look.group + head + look.group
    captions = [wrap(prompt, look.text, look.caption - look.group) for prompt, _ in prompts]
    shown = [
        _thumbnail(references[prompt](), look.caption // 3) if prompt in references else None
        for prompt in prompts
    ]
    taken = [
        line_height(look.text) * len(lines) + (small.height + look.gap if small else 0)
        for lines, small in zip(captions, shown, strict=True)
    ]
    heights = [max(look.tile, each) for each in taken]
    height = grid + sum(heights) + look.group * (len(prompts) - 1) + look.margin
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)

    text(draw, (look.margin, look.margin), title, look.title, INK, bold=True)
    for index, line in enumerate(subtitles):
        at = look.margin + line_height(look.title) + index * line_height(look.small)
        text(draw, (look.margin, at), line, look.small, SOFT)
    left = [
        look.margin + look.caption + index * (block + look.group) for index in range(len(variants))
    ]
    for x, name, note in zip(left, names, notes_wrapped, strict=True):
        # Names stand on one line at the bottom of the header, notes below them.
        y = top + look.group
        for line in name:
            text(draw, (x, y), line, look.text, INK, bold=True)
            y += line_height(look.text)
        for line in note:
            text(draw, (x, y), line, look.small, SOFT)
            y += line_height(look.small)
    y = grid
    rows = zip(prompts, captions, shown, taken, heights, strict=True)
    for prompt, lines, small, needed, tall in rows:
        rule = y - look.group // 2
        draw.line((look.margin, rule, width - look.margin - 1, rule), fill=LINE, width=2)
        down = y + (tall - needed) // 2
        for line in lines:
            text(draw, (look.margin, down), line, look.text, INK)
            down += line_height(look.text)
        if small is not None:
            page.paste(small, (look.margin, down + look.gap))
        for x, variant in zip(left, variants, strict=True):
            for index, seed in enumerate(seeds[prompt]):
                corner = (x + index * (look.wide + look.gap), y)
                _tile(page, corner, look, images, cells.get((variant, prompt, seed)))
        y += tall + look.group
    return page


def _tile(
    page: Any, corner: tuple[int, int], look: Look, images: Path, row: dict[str, Any] | None
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(page)
    x, y = corner
    box = (x, y, x + look.wide - 1, y + look.tile - 1)
    if row is None:
        draw.rectangle(box, fill="#f4f5f7")
        return
    # Of a video that has fewer frames than tiles some tiles stay empty.
    for number, frame in enumerate(read_media(images / row["file"], ends_and_middle)):
        small = _thumbnail(frame, look.tile)
        left = x + number * look.tile + (look.tile - small.width) // 2
        page.paste(small, (left, y + (look.tile - small.height) // 2))
    draw.rectangle(box, outline=LINE)
    if row.get("score") is not None:
        badge = _badge(bool(row["score"]["right"]), max(18, look.tile // 8))
        edge = max(4, look.tile // 28)
        page.paste(
            badge, (x + look.wide - badge.width - edge, y + look.tile - badge.height - edge), badge
        )


def _thumbnail(picture: Any, side: int) -> Any:
    """A picture whose longer side has so many pixels."""
    from PIL import Image

    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _badge(right: bool, size: int) -> Any:
    """A check on green or a cross on red, drawn large and shrunk for smooth edges."""
    from PIL import Image, ImageDraw

    big = 128
    badge = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, big - 1, big - 1), fill="white")
    draw.ellipse((8, 8, big - 9, big - 9), fill=RIGHT if right else WRONG)
    strokes = (
        [[(36, 66), (56, 86), (92, 44)]] if right else [[(42, 42), (86, 86)], [(86, 42), (42, 86)]]
    )
    for stroke in strokes:
        draw.line(stroke, fill="white", width=15, joint="curve")
        for px, py in stroke:
            draw.ellipse((px - 7, py - 7, px + 7, py + 7), fill="white")
    return badge.resize((size, size), Image.Resampling.LANCZOS)


def text(
    draw: Any, at: tuple[int, int], line: str, size: int, colour: str, *, bold: bool = False
) -> None:
    """Pillow brings one weight of one font; a hairline stroke makes the bold one."""
    stroke = _bold(size) if bold else 0
    draw.text(at, line, font=font(size), fill=colour, stroke_width=stroke, stroke_fill=colour)


def _bold(size: int) -> float:
    import PIL

    # Older releases take whole strokes only, which would be too fat.
    fine = tuple(int(part) for part in PIL.__version__.split(".")[:2]) >= (11, 2)
    return size / 48 if fine else 0


def font(size: int) -> Any:
    """The font that ships with Pillow, so that a sheet looks the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def line_height(size: int) -> int:
    """Distance between two lines of text."""
    return round(size * 1.36)


def wrap(words: str, size: int, width: int, *, bold: bool = False) -> list[str]:
    """Break text into lines of at most `width` pixels, inside a word only where it must."""
    shape = font(size)
    room = width - (2 * _bold(size) if bold else 0)
    lines: list[str] = []
    line = ""
    for word in words.split():
        while len(word) > 1 and shape.getlength(word) > room:
            fits = [n for n in range(1, len(word)) if shape.getlength(word[:n]) <= room]
            cut = max(fits, default=1)
            if line:
                lines.append(line)
                line = ""
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{line} {word}".strip()
        if line and shape.getlength(longer) > room:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line] if line else lines
