"""Who is drawn, and how it stands: what the drawers of mini's things share."""

import math
import random
from dataclasses import dataclass

from raybooth.mini.pen import Color, Oval, Pen

COLORS: dict[str, Color] = {
    "red": (214, 44, 44),
    "orange": (244, 138, 36),
    "yellow": (248, 208, 56),
    "green": (52, 150, 72),
    "blue": (48, 98, 214),
    "purple": (136, 70, 180),
    "pink": (246, 146, 184),
    "brown": (132, 82, 48),
    "black": (44, 44, 50),
    "white": (248, 246, 240),
    "grey": (148, 150, 156),
}
DARK, GLASS = (24, 22, 26), (190, 226, 246)


@dataclass(frozen=True)
class Identity:
    """One individual. `color` and `accent` are keys of COLORS; `pattern` is plain, spots, stripes or patches."""

    kind: str
    color: str
    accent: str
    pattern: str
    seed: int

    @property
    def paint(self) -> Color:
        return COLORS[self.color]

    @property
    def second(self) -> Color:
        return COLORS[self.accent]


@dataclass(frozen=True)
class Pose:
    """How an identity stands in one picture: `posture` is a phrase or empty, `worn` an accessory with its colour or None."""

    posture: str = ""
    worn: tuple[str, str] | None = None


def spots_of(rng: random.Random) -> list[tuple[float, float, float]]:
    """Three to five spots (u, v, radius in picture units) that keep clear of each other."""
    spots: list[tuple[float, float, float]] = []
    for _ in range(60):
        u, v, r = rng.uniform(-0.75, 0.75), rng.uniform(-0.6, 0.6), rng.uniform(1.7, 2.8)
        if u * u + v * v < 0.6 and all(math.hypot((u - a) * 14, (v - b) * 8) > r + c + 0.8 for a, b, c in spots):
            spots.append((u, v, r))
    return spots[: rng.randint(3, 5)]


def coat_pattern(pen: Pen, body: Oval, who: Identity, rng: random.Random) -> None:
    """The pattern on a body. Every branch draws from `rng` alike, so that nothing after it depends on the pattern."""
    spots, phase, side = spots_of(rng), rng.uniform(-0.15, 0.15), rng.choice((-1, 1))
    if who.pattern == "spots":
        for u, v, r in spots:
            pen.circle(*body.at(u, v), r, who.second)
    elif who.pattern == "stripes":
        for u in (-0.6, -0.2, 0.2, 0.6):
            pen.polygon(body.band(u + phase, 0.09), who.second)
    elif who.pattern == "patches":
        for u, v, r in ((0.45 * side, -0.2, 0.5), (-0.5 * side, 0.15, 0.36)):
            x, y = body.at(u + phase, v)
            pen.oval(Oval(x, y, body.rx * r * 0.8, body.ry * r * 1.35, body.angle), who.second)


def wear(pen: Pen, pose: Pose, head: Oval, neck: tuple[float, float, float]) -> None:
    """Draw what the pose wears; `neck` is (x, y, half width)."""
    if pose.worn is None:
        return
    what, color = pose.worn[0], COLORS[pose.worn[1]]
    x, y, w = neck
    if what == "hat":
        top = head.y - head.ry
        pen.rect(head.x - head.rx * 0.95, top - 0.4, head.x + head.rx * 0.95, top + 2.0, color, 0.8)
        pen.rect(head.x - head.rx * 0.6, top - 6.0, head.x + head.rx * 0.6, top + 0.6, color, 1)
    elif what == "collar":
        pen.line([(x - w, y - 0.6), (x + w, y + 0.6)], 2.4, color)
        pen.circle(x + w * 0.5, y + 2.2, 1.3, COLORS["yellow"])
    else:  # scarf
        pen.line([(x - w, y - 0.4), (x + w, y + 0.6)], 3.6, color)
        pen.line([(x - w * 0.3, y), (x - w * 0.5, y + 8)], 3.2, color)
