"""Product pictures: drawn, then resized to the shop's formats (queue media)."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageDraw
from pydantic import Field

from examples.shop import app, places

__all__ = ["FORMATS", "Form", "draw", "fit", "make", "original", "resize", "resized", "sheet"]

Form = Literal["large", "card", "icon"]
#: Name of a format -> the longest side in pixels.
FORMATS: dict[Form, int] = {"large": 1024, "card": 320, "icon": 96}

Pixels = Annotated[int, Field(ge=1, le=10_000)]
# It becomes a file name: nothing that could leave the folder.
Name = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,60}$")]


#: Sides of a picture on the contact sheet, in pixels, and pictures in a row of it.
_CELL, _COLUMNS = 160, 6


def original(name: str) -> Path:
    """Where the picture as drawn is kept."""
    return places.images() / f"{name}.jpg"


def resized(name: str, form: Form) -> Path:
    """Where the picture in one of the `FORMATS` is kept."""
    return places.images() / f"{name}-{form}.jpg"


def fit(width: int, height: int, side: int) -> tuple[int, int]:
    """The size of a picture whose longest side becomes `side` pixels. Pictures are never enlarged."""
    longest = max(width, height)
    if longest <= side:
        return width, height
    return max(1, round(width * side / longest)), max(1, round(height * side / longest))


def draw(seed: int, width: int, height: int) -> Image.Image:
    """An abstract picture. The same seed draws the same one."""
    chance = random.Random(seed)
    picture = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    pencil = ImageDraw.Draw(picture, "RGBA")
    for _ in range(40):
        x, y = chance.randrange(width), chance.randrange(height)
        radius = chance.randrange(10, max(11, min(width, height) // 4))
        colour = (*(chance.randrange(256) for _ in range(3)), 140)
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture


@app.task(name="image.make")
def make(name: Name, seed: int, width: Pixels, height: Pixels) -> str:
    """Draw a picture, then have it resized: one message for each format. Returns its name."""
    _save(draw(seed, width, height), original(name))
    app.send_many([resize.s(name, form) for form in FORMATS])
    return name


@app.task(name="image.resize")
def resize(name: Name, form: Form) -> tuple[int, int]:
    """Write the picture in one of the `FORMATS`. Returns its size."""
    with Image.open(original(name)) as picture:
        size = fit(*picture.size, FORMATS[form])
        # Lets the JPEG decoder skip detail that the small picture does not show.
        picture.draft("RGB", size)
        small = picture.resize(size, Image.Resampling.LANCZOS)
    _save(small, resized(name, form))
    return size


@app.task(name="image.sheet", bind=True)
def sheet(self: Any, names: list[Name]) -> int:
    """Put pictures on one sheet, when all are drawn: the body of a chord. Says how far it is."""
    page = Image.new("RGB", (_COLUMNS * _CELL, -(-len(names) // _COLUMNS) * _CELL), "white")
    for number, name in enumerate(names):
        with Image.open(original(name)) as picture:
            picture.thumbnail((_CELL - 10, _CELL - 10))
            left, top = number % _COLUMNS * _CELL, number // _COLUMNS * _CELL
            page.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
        self.update_state(state="PROGRESS", meta={"done": number + 1, "of": len(names)})
    _save(page, places.sheet())
    return len(names)


def _save(picture: Image.Image, path: Path) -> None:
    # Whole or not at all, also when the process dies here or the message is delivered twice.
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(draft, "JPEG", quality=85)
    draft.replace(path)
