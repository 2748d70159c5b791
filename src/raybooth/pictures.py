"""Pictures as they are written: PNGs that carry text, and contact sheets."""

import contextlib
import io

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

LONGEST_TITLE = 200  # characters
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf")
"""Those with the most letters first."""


def png(image: Image.Image, **text: str) -> bytes:
    """The picture as PNG, with `text` as its text chunks. The same picture and text give the same bytes."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], cell: int = 128) -> Image.Image:
    """One picture made of many: each of `rows` under its title; long titles are cut."""
    gap, title = 6, 18
    columns = max((len(images) for _, images in rows), default=1)
    rows = [(" ".join(text.split()), images) for text, images in rows]
    rows = [(text if len(text) <= LONGEST_TITLE else f"{text[: LONGEST_TITLE - 3]}...", images) for text, images in rows]
    font = _font("".join(text for text, _ in rows))
    width = max(columns * (cell + gap) + gap, *(int(font.getlength(t)) + 2 * gap for t, _ in rows))
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + title) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (text, images) in enumerate(rows):
        top = gap + r * (cell + gap + title)
        draw.text((gap, top), text, "black", font)
        for c, image in enumerate(images):
            small = image.resize((cell, cell), Image.Resampling.LANCZOS if image.width > cell else Image.Resampling.NEAREST)
            sheet.paste(small, (gap + c * (cell + gap), top + title))
    return sheet


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font for `text`: Pillow's own has only the letters of English, so for others one of this machine, if there is one."""
    for name in () if text.isascii() else FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 12)
    return ImageFont.load_default(13)
