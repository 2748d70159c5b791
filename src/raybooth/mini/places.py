"""The eight places of mini's world. Each paints a whole background; small things move, so that no two are equal."""

import random
from collections.abc import Callable

from PIL import Image

from raybooth.mini.pen import SIZE, Color, Oval, Pen, blank, shade

HORIZON = 40.0  # where the ground begins, picture units from the top

Painter = Callable[[Pen, random.Random], None]


def _ground(pen: Pen, color: Color, y: float = HORIZON) -> None:
    pen.rect(0, y, SIZE, SIZE, color)


def _disc(pen: Pen, rng: random.Random, color: Color) -> None:
    pen.circle(rng.choice((10, 54)) + rng.uniform(-3, 3), 9 + rng.uniform(-1, 1), 4.5, color)


def _snow(pen: Pen, rng: random.Random) -> None:
    _ground(pen, (236, 242, 248))
    for i in range(9):  # flakes on a loose grid
        pen.circle(4 + i * 7 + rng.uniform(-2, 2), 6 + (i % 3) * 11 + rng.uniform(-2, 2), 1.1, (255, 255, 255))


def _beach(pen: Pen, rng: random.Random) -> None:
    _disc(pen, rng, (255, 214, 70))
    pen.rect(0, 33, SIZE, 41, (48, 128, 200))
    _ground(pen, (238, 214, 156), 41)


def _city(pen: Pen, rng: random.Random) -> None:
    x, heights = rng.uniform(-8, 0), (26, 16, 22, 12, 24, 18, 27)
    for i in range(7):
        left, top = x + i * 11, heights[i] + rng.uniform(-2, 2)
        pen.rect(left, top, left + 9.5, HORIZON, ((104, 100, 128), (124, 112, 140))[i % 2])
        for wy in range(int(top) + 3, 38, 5):
            for wx in (2, 6):
                pen.rect(left + wx, wy, left + wx + 1.8, wy + 2.2, (250, 226, 140))
    _ground(pen, (112, 112, 118))


def _night(pen: Pen, rng: random.Random) -> None:
    _disc(pen, rng, (250, 246, 216))
    for i in range(8):
        pen.circle(5 + i * 8 + rng.uniform(-2, 2), 6 + (i * 5 % 3) * 10 + rng.uniform(-2, 2), 0.8, (255, 255, 240))
    _ground(pen, (34, 40, 52))


def _desert(pen: Pen, rng: random.Random) -> None:
    x = rng.choice((9, 55)) + rng.uniform(-3, 3)
    green = (62, 132, 74)
    pen.line([(x, 40), (x, 22)], 3.4, green)
    pen.line([(x, 34), (x - 5, 34), (x - 5, 27)], 2.4, green)
    pen.line([(x, 31), (x + 5, 31), (x + 5, 25)], 2.4, green)
    _ground(pen, (226, 160, 88))


def _grass(pen: Pen, rng: random.Random) -> None:
    x = rng.uniform(8, 56)
    pen.oval(Oval(x, 10, 8, 3.4), (255, 255, 255))
    pen.oval(Oval(x + 4, 8, 5, 3.4), (255, 255, 255))
    _ground(pen, (92, 170, 72))
    for i in range(6):  # flowers
        color = ((250, 220, 80), (250, 250, 250))[i % 2]
        pen.circle(6 + i * 11 + rng.uniform(-3, 3), (44, 60)[i % 2] + rng.uniform(-1, 1), 1.2, color)


def _water(pen: Pen, rng: random.Random) -> None:
    _ground(pen, (44, 112, 196), 38)
    for i in range(6):  # waves
        x, y = 4 + i * 11 + rng.uniform(-3, 3), (43, 52, 60)[i % 3] + rng.uniform(-1, 1)
        pen.line([(x - 4, y), (x - 2, y - 1.4), (x, y), (x + 2, y - 1.4), (x + 4, y)], 1.1, (150, 200, 240))


def _room(pen: Pen, rng: random.Random) -> None:
    x = rng.choice((4, 44)) + rng.uniform(-2, 2)
    pen.rect(x, 6, x + 16, 24, (132, 88, 56))
    pen.rect(x + 2, 8, x + 7.2, 22, (170, 216, 244))
    pen.rect(x + 8.8, 8, x + 14, 22, (170, 216, 244))
    _ground(pen, (164, 108, 68), 42)
    for y in (48, 55):
        pen.rect(0, y, SIZE, y + 0.8, (136, 86, 52))


# phrase in a caption -> (colour of the sky or wall, painter)
PLACES: dict[str, tuple[Color, Painter]] = {
    "in the snow": ((186, 206, 226), _snow),
    "on the beach": ((136, 206, 244), _beach),
    "in the city": ((186, 184, 200), _city),
    "at night": ((18, 22, 60), _night),
    "in the desert": ((250, 206, 134), _desert),
    "on the grass": ((132, 196, 246), _grass),
    "on the water": ((160, 216, 244), _water),
    "in a room": ((232, 208, 186), _room),
}


def paint(place: str, rng: random.Random) -> Image.Image:
    """An oversampled canvas of `place`, a key of PLACES."""
    sky, painter = PLACES[place]
    canvas = blank(shade(sky, rng.uniform(0.95, 1.05)))
    painter(Pen(canvas), rng)
    return canvas
