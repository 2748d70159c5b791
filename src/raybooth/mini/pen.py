"""Flat shapes in picture units, drawn large and reduced: what every thing and place of mini's world is made of."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64  # side of a picture, pixels
OVERSAMPLE = 4  # drawn this much larger, then reduced with a box filter: clean edges without an antialiasing renderer

Color = tuple[int, int, int]
Point = tuple[float, float]


def shade(color: Color, factor: float) -> Color:
    """`color` made darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1:
        r, g, b = (round(c * factor) for c in color)
    else:
        r, g, b = (round(255 - (255 - c) * (2 - factor)) for c in color)
    return r, g, b


@dataclass(frozen=True)
class Oval:
    """An ellipse with its own frame (u along its length, v across, both in [-1, 1]), so that patterns lie on a turned body."""

    x: float
    y: float
    rx: float
    ry: float
    angle: float = 0.0  # radians, clockwise in the picture (y points down)

    def at(self, u: float, v: float) -> Point:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        du, dv = u * self.rx, v * self.ry
        return self.x + du * cos - dv * sin, self.y + du * sin + dv * cos

    def outline(self, n: int = 36) -> list[Point]:
        return [self.at(math.cos(2 * math.pi * i / n), math.sin(2 * math.pi * i / n)) for i in range(n)]

    def band(self, u: float, half_width: float, inset: float = 0.97) -> list[Point]:
        """A stripe across the oval at `u`, cut to its outline."""
        us = [max(-0.999, min(0.999, u + d * half_width)) for d in (-1, -0.5, 0, 0.5, 1)]
        upper = [self.at(w, -inset * math.sqrt(1 - w * w)) for w in us]
        lower = [self.at(w, inset * math.sqrt(1 - w * w)) for w in reversed(us)]
        return upper + lower


class Pen:
    """Draws in picture units on an oversampled canvas, from an origin, at a scale, and mirrored if asked."""

    def __init__(self, canvas: Image.Image, x: float = 0, y: float = 0, scale: float = 1, mirrored: bool = False):
        self.draw = ImageDraw.Draw(canvas)
        self.x, self.y, self.scale, self.sign = x, y, scale, -1 if mirrored else 1

    def _map(self, p: Point) -> Point:
        return (
            (self.x + self.sign * self.scale * p[0]) * OVERSAMPLE,
            (self.y + self.scale * p[1]) * OVERSAMPLE,
        )

    def polygon(self, points: list[Point], color: Color) -> None:
        self.draw.polygon([self._map(p) for p in points], fill=color)

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: Color, radius: float = 0) -> None:
        (ax, ay), (bx, by) = self._map((x0, y0)), self._map((x1, y1))
        box = (min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
        self.draw.rounded_rectangle(box, radius * self.scale * OVERSAMPLE, fill=color)

    def oval(self, oval: Oval, color: Color) -> None:
        self.polygon(oval.outline(), color)

    def circle(self, x: float, y: float, r: float, color: Color) -> None:
        self.oval(Oval(x, y, r, r), color)

    def line(self, points: list[Point], width: float, color: Color) -> None:
        """A bent line with round ends."""
        mapped = [self._map(p) for p in points]
        w = max(1, round(width * self.scale * OVERSAMPLE))
        self.draw.line(mapped, fill=color, width=w, joint="curve")
        for px, py in (mapped[0], mapped[-1]):
            self.draw.ellipse((px - w / 2, py - w / 2, px + w / 2, py + w / 2), fill=color)


def blank(color: Color) -> Image.Image:
    return Image.new("RGB", (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE), color)


def reduced(canvas: Image.Image) -> Image.Image:
    """The (SIZE, SIZE) picture of an oversampled canvas."""
    return canvas.reduce(OVERSAMPLE)
