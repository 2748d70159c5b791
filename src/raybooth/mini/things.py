"""The eleven kinds of things in mini's world.

A drawer gets a pen whose origin is where the thing touches the ground and which looks to the right, and draws from the
thing's identity. All that captions never mention (proportions, the shape of ears, where the spots lie) comes from the
identity's seed; only pose and accessory differ between two pictures of one identity.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from raybooth.mini.pen import Color, Oval, Pen, shade

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


def _spots(rng: random.Random) -> list[tuple[float, float, float]]:
    """Three to five spots (u, v, radius in picture units) that keep clear of each other."""
    spots: list[tuple[float, float, float]] = []
    for _ in range(60):
        u, v, r = rng.uniform(-0.75, 0.75), rng.uniform(-0.6, 0.6), rng.uniform(1.7, 2.8)
        if u * u + v * v < 0.6 and all(math.hypot((u - a) * 14, (v - b) * 8) > r + c + 0.8 for a, b, c in spots):
            spots.append((u, v, r))
    return spots[: rng.randint(3, 5)]


def _coat(pen: Pen, body: Oval, who: Identity, rng: random.Random) -> None:
    """The pattern on a body. Every branch draws from `rng` alike, so that nothing after it depends on the pattern."""
    spots, phase, side = _spots(rng), rng.uniform(-0.15, 0.15), rng.choice((-1, 1))
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


def _wear(pen: Pen, pose: Pose, head: Oval, neck: tuple[float, float, float]) -> None:
    """`neck` is (x, y, half width)."""
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


def _dog(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    length, height, leg = rng.uniform(12, 15.5), rng.uniform(6.8, 8.2), rng.uniform(7, 11)
    r, ears, ear = rng.uniform(6.2, 7.6), rng.choice(("floppy", "pointed", "round")), rng.uniform(0.8, 1.25)
    muzzle, tail = rng.uniform(4.5, 7), rng.choice(("up", "straight", "stub"))
    eared, faced = rng.random() < 0.6, rng.random() < 0.4
    coat, dark = who.paint, shade(who.paint, 0.82)
    accent = who.second if who.pattern != "plain" else dark
    if pose.posture == "sitting":
        body = Oval(-3, -11, length * 0.86, height, -1.0)
        head = Oval(6, -11 - length * 0.86 - 1.5, r, r)
        pen.line([(-9, -2), (-16, -5)], 3, accent if eared else coat)
        pen.line([(4, -9), (4, -1.5)], 3.6, dark)
    else:
        body = Oval(-3, -leg - height * 0.6, length, height)
        head = Oval(length - 3, body.y - height * 0.5 - r * 0.75, r, r)
        for x in (-0.55, 0.72):
            pen.line([(body.x + length * x, body.y), (body.x + length * x, -1.6)], 3.6, dark)
        end = {"up": (-length - 9, body.y - 12), "straight": (-length - 11, body.y - 3), "stub": (-length - 5, body.y - 6)}[tail]
        pen.line([(-length, body.y - 2), end], 3, accent if eared else coat)
    pen.oval(body, coat)
    _coat(pen, body, who, rng)
    if pose.posture == "sitting":
        pen.oval(Oval(-6, -5.5, 6.5, 5.2), coat)
        pen.line([(7, -9), (8, -1.6)], 3.6, coat)
    else:
        for x in (-0.78, 0.5):
            pen.line([(body.x + length * x, body.y + 1), (body.x + length * x, -1.6)], 3.6, coat)
    neck = (head.x - 2.6, head.y + r * 0.95, 3.6)
    pen.line([(head.x - 2, head.y + 2), (neck[0] - 0.6, neck[1] + 2)], 6.5, coat)
    _wear(pen, Pose(worn=pose.worn if pose.worn and pose.worn[0] != "hat" else None), head, neck)
    if ears == "pointed":
        pen.polygon([(head.x - r * 0.9, head.y - r * 0.4), (head.x - r * 0.5, head.y - r - 4.6 * ear), (head.x + r * 0.35, head.y - r * 0.7)], accent if eared else dark)
    pen.oval(Oval(head.x + r * 0.8, head.y + 1.6, muzzle, r * 0.52), coat)
    pen.oval(head, coat)
    if faced and who.pattern != "plain":
        pen.circle(head.x + r * 0.3, head.y - 1.4, 3.2, who.second)
    pen.circle(head.x + r * 0.8 + muzzle - 0.6, head.y + 0.6, 1.8, DARK if who.color != "black" else (120, 90, 90))
    pen.circle(head.x + r * 0.3, head.y - 1.4, 2.0, (255, 255, 255))
    pen.circle(head.x + r * 0.38, head.y - 1.4, 1.3, DARK)
    if ears == "floppy":
        pen.oval(Oval(head.x - r * 0.55, head.y + 1.5 * ear, 2.7, 5.4 * ear, 0.15), accent if eared else dark)
    elif ears == "round":
        pen.circle(head.x - r * 0.6, head.y - r * 0.75, 3.4 * ear, accent if eared else dark)
    if pose.worn and pose.worn[0] == "hat":
        _wear(pen, pose, head, neck)


def _cat(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    length, height, leg = rng.uniform(11.5, 14.5), rng.uniform(6.2, 7.4), rng.uniform(6.5, 10)
    r, ear, eye = rng.uniform(7, 8.4), rng.uniform(4.5, 7.5), rng.choice(("green", "yellow", "blue"))
    curl, masked, tipped = rng.choice((-1, 1)), rng.random() < 0.4, rng.random() < 0.6
    coat, dark = who.paint, shade(who.paint, 0.82)
    accent = who.second if who.pattern != "plain" else dark
    if pose.posture == "sitting":
        body = Oval(-3, -10.5, length * 0.84, height * 1.1, -1.2)
        head = Oval(2, -11 - length * 0.84 - r * 0.45, r, r * 0.9)
        pen.line([(-8, -2.5), (-15, -3), (-17, -8 - 2 * curl)], 2.8, accent if tipped else coat)
    else:
        body = Oval(-3, -leg - height * 0.6, length, height)
        head = Oval(length - 2, body.y - height * 0.5 - r * 0.5, r, r * 0.9)
        for x in (-0.5, 0.75):
            pen.line([(body.x + length * x, body.y), (body.x + length * x, -1.4)], 3.2, dark)
        pen.line([(-length, body.y - 1), (-length - 6, body.y - 7), (-length - 5 - 3 * curl, body.y - 16)], 2.8, accent if tipped else coat)
    pen.oval(body, coat)
    _coat(pen, body, who, rng)
    if pose.posture == "sitting":
        pen.oval(Oval(-5, -4.8, 6, 4.6), coat)
        for x in (3, 7):
            pen.line([(x, -9), (x, -1.4)], 3, coat)
    else:
        for x in (-0.78, 0.48):
            pen.line([(body.x + length * x, body.y + 1), (body.x + length * x, -1.4)], 3.2, coat)
    neck = (head.x - 1, head.y + r * 0.95, 4.6)
    if pose.worn and pose.worn[0] != "hat":
        _wear(pen, pose, head, neck)
    for s in (-1, 1):
        tip = (head.x + s * r * 0.75, head.y - r * 0.7 - ear)
        pen.polygon([(head.x + s * r * 0.95, head.y - r * 0.2), tip, (head.x + s * r * 0.1, head.y - r * 0.75)], accent if tipped else coat)
    pen.oval(head, coat)
    if masked and who.pattern != "plain":
        pen.oval(Oval(head.x + r * 0.42, head.y - 0.8, 3.2, 3.4), who.second)
    for s in (-1, 1):
        pen.circle(head.x + s * r * 0.42, head.y - 0.8, 2.0, COLORS[eye] if eye != who.color else (255, 255, 255))
        pen.circle(head.x + s * r * 0.42, head.y - 0.8, 1.1, DARK)
    pen.circle(head.x, head.y + r * 0.42, 1.2, COLORS["pink"] if who.color != "pink" else DARK)
    if pose.worn and pose.worn[0] == "hat":
        _wear(pen, pose, head, neck)


def _bird(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    rx, ry, r = rng.uniform(10.5, 13), rng.uniform(8, 9.6), rng.uniform(5.6, 6.8)
    beak, crest, tail = rng.uniform(4.5, 8), rng.random() < 0.5, rng.uniform(6, 10)
    lift = 14.0 if pose.posture == "flying" else 0.0
    body = Oval(-2, -7 - ry - lift, rx, ry, -0.2)
    head = Oval(rx * 0.7, body.y - ry * 0.75, r, r)
    if not lift:
        for x in (-3.0, 2.0):
            pen.line([(x, body.y + ry * 0.7), (x, -1)], 1.7, COLORS["orange"])
            pen.line([(x, -1), (x + 2.6, -1)], 1.7, COLORS["orange"])
    pen.polygon([body.at(-0.8, -0.3), (body.x - rx - tail, body.y - 2), (body.x - rx - tail, body.y + 4), body.at(-0.7, 0.5)], who.second)
    orange = COLORS["orange"] if who.color != "orange" else COLORS["yellow"]
    pen.polygon([(head.x + r * 0.8, head.y - 2), (head.x + r + beak, head.y + 0.6), (head.x + r * 0.8, head.y + 2.8)], orange)
    if crest:
        pen.polygon([(head.x - 3, head.y - r * 0.7), (head.x - 4.5, head.y - r - 4.5), (head.x + 1.5, head.y - r * 0.85)], who.second)
    pen.oval(body, who.paint)
    _coat(pen, body, who, rng)
    pen.oval(head, who.paint)
    pen.circle(head.x + 1.8, head.y - 1, 2.0, (255, 255, 255))
    pen.circle(head.x + 2.2, head.y - 1, 1.2, DARK)
    if lift:
        pen.polygon([body.at(-0.35, -0.3), (body.x - 8, body.y - 17), (body.x + 1, body.y - 14), body.at(0.4, -0.3)], who.second)
    else:
        pen.oval(Oval(body.x - 1.5, body.y, rx * 0.55, ry * 0.48, 0.25), who.second)
    _wear(pen, pose, head, (head.x - 2, head.y + r, 4))


def _fish(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    rx, ry = rng.uniform(13, 17), rng.uniform(7.5, 10.5)
    fin, tail, fork = rng.uniform(4, 8), rng.uniform(6, 9), rng.uniform(0, 4)
    body = Oval(1, -13, rx, ry)
    left = body.x - rx
    pen.polygon([(left + 3, -13), (left - tail, -13 - ry * 0.8), (left - tail + fork, -13), (left - tail, -13 + ry * 0.8)], who.second)
    pen.polygon([body.at(-0.5, -0.7), body.at(-0.3, -1 - fin / ry), body.at(0.4, -0.8)], who.second)
    pen.polygon([body.at(-0.3, 0.8), body.at(-0.3, 0.9 + fin * 0.7 / ry), body.at(0.2, 0.85)], who.second)
    pen.oval(body, who.paint)
    _coat(pen, Oval(body.x - 2, body.y, rx * 0.8, ry), who, rng)
    pen.circle(body.x + rx * 0.62, body.y - ry * 0.25, 2.6, (255, 255, 255))
    pen.circle(body.x + rx * 0.68, body.y - ry * 0.25, 1.5, DARK)
    pen.line([body.at(0.95, 0.3), body.at(0.72, 0.36)], 1.2, DARK)
    _wear(pen, pose, Oval(body.x + rx * 0.45, body.y, rx * 0.4, ry * 0.86), (0, 0, 0))


def _car(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, height, cabin = rng.uniform(18, 21.5), rng.uniform(7.5, 10), rng.uniform(7, 10.5)
    front, back, wheel, panes = rng.uniform(4, 8), rng.uniform(12, 17), rng.uniform(3.8, 5), rng.random() < 0.6
    top = -wheel - height
    pen.polygon([(-back, top + 1), (-back + 4, top - cabin), (front, top - cabin), (front + 6, top + 1)], shade(who.paint, 0.86))
    pen.polygon([(-back + 2.4, top), (-back + 5.6, top - cabin + 2), (front - 0.6, top - cabin + 2), (front + 3.6, top)], GLASS)
    if panes:
        mid = (front - back) / 2
        pen.rect(mid - 0.8, top - cabin + 1, mid + 0.8, top, shade(who.paint, 0.86))
    pen.rect(-half, top, half, -wheel + 1, who.paint, 2.5)
    pen.rect(-half, top + height * 0.42, half, top + height * 0.42 + 2.4, who.second)
    pen.circle(half - 1.8, top + 3, 1.8, (255, 240, 150))
    for x in (-half * 0.58, half * 0.58):
        pen.circle(x, -wheel, wheel, DARK)
        pen.circle(x, -wheel, wheel * 0.45, (200, 200, 206))


def _boat(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, depth, mast = rng.uniform(16, 20), rng.uniform(8, 11), rng.uniform(22, 27)
    x, big, small, port = rng.uniform(-4, 2), rng.uniform(10, 14), rng.uniform(6, 9), rng.randint(1, 3)
    pen.line([(x, -depth), (x, -depth - mast)], 1.8, COLORS["brown"])
    pen.polygon([(x + 1.4, -depth - mast + 1), (x + big, -depth - 3), (x + 1.4, -depth - 3)], who.second)
    pen.polygon([(x - 1.6, -depth - mast + 5), (x - small, -depth - 3), (x - 1.6, -depth - 3)], shade(who.second, 0.86))
    pen.polygon([(-half, -depth), (half, -depth), (half - 6, -1), (-half + 5, -1)], who.paint)
    for i in range(port):
        pen.circle((i - (port - 1) / 2) * 8, -depth * 0.55, 1.9, GLASS)


def _house(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, wall, roof = rng.uniform(12, 16), rng.uniform(15, 19), rng.uniform(10, 15)
    eave, door, chimney = rng.uniform(2, 4.5), rng.uniform(-6, 6), rng.choice((-1, 0, 1))
    if chimney:
        pen.rect(chimney * 7 - 2, -wall - roof, chimney * 7 + 2, -wall, (124, 74, 62))
    pen.rect(-half, -wall, half, -1, who.paint)
    pen.polygon([(-half - eave, -wall + 0.6), (0, -wall - roof), (half + eave, -wall + 0.6)], who.second)
    pen.rect(door - 3, -10, door + 3, -1, shade(who.second, 0.7))
    side = -1 if door > 0 else 1
    for x in (side * half * 0.58,) if abs(door) > 2 else (-half * 0.62, half * 0.62):
        pen.rect(x - 3, -wall + 4, x + 3, -wall + 10, GLASS, 0.5)


def _cup(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, height, taper = rng.uniform(9.5, 12.5), rng.uniform(18, 24), rng.uniform(0, 3.5)
    ring, grip, dots = rng.uniform(4.5, 6.5), rng.uniform(0.4, 0.6), rng.random() < 0.5
    pen.circle(half + 1, -height * grip, ring, shade(who.paint, 0.86))
    pen.circle(half + 1, -height * grip, ring - 2.4, shade(who.paint, 0.55))
    pen.polygon([(-half, -height), (half, -height), (half - taper, -2), (-half + taper, -2)], who.paint)
    pen.oval(Oval(0, -2, half - taper, 2), who.paint)
    if dots:
        for u in (-0.5, 0, 0.5):
            pen.circle(u * half, -height * (0.35 if u else 0.62), 2.4, who.second)
    else:
        pen.rect(-half + taper * 0.45, -height * 0.6, half - taper * 0.45, -height * 0.6 + 4, who.second)
    pen.oval(Oval(0, -height, half, 2.6), shade(who.paint, 0.6))


def _teapot(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    rx, ry, spout = rng.uniform(11, 13.5), rng.uniform(9, 11), rng.uniform(5, 9)
    knob, ring, dotted = rng.uniform(1.8, 3), rng.uniform(5, 6.5), rng.random() < 0.5
    body = Oval(-1, -ry - 1, rx, ry)
    pen.circle(body.x - rx, body.y - 0.5, ring, shade(who.paint, 0.86))
    pen.circle(body.x - rx, body.y - 0.5, ring - 2.4, shade(who.paint, 0.55))
    pen.polygon([body.at(0.7, 0.5), (body.x + rx + spout, body.y - ry * 0.75), (body.x + rx + spout - 3.4, body.y - ry * 0.95), body.at(0.72, -0.3)], shade(who.paint, 0.86))
    pen.oval(body, who.paint)
    if dotted:
        for u in (-0.5, 0.0, 0.5):
            pen.circle(*body.at(u, 0.15), 2.2, who.second)
    pen.oval(Oval(body.x, body.y - ry * 0.86, rx * 0.58, 2.6), who.second)
    pen.circle(body.x, body.y - ry * 0.86 - 3.2, knob, who.second)


def _backpack(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, height, round_ = rng.uniform(10.5, 13.5), rng.uniform(25, 31), rng.uniform(4, 8)
    pocket, flap, button = rng.uniform(8, 11.5), rng.uniform(8, 12), rng.random() < 0.5
    pen.circle(0, -height, 4.4, shade(who.paint, 0.6))
    for s in (-1, 1):
        pen.rect(s * half - 2.4, -height * 0.6, s * half + 2.4, -4, shade(who.paint, 0.7), 2)
    pen.rect(-half, -height, half, -1, who.paint, round_)
    pen.rect(-half + 2.6, -height + flap, half - 2.6, -height + flap + 1.5, shade(who.paint, 0.6))
    pen.rect(-half + 3.4, -3 - pocket, half - 3.4, -3, who.second, 2)
    if button:
        pen.circle(0, -pocket + 1, 1.5, (250, 236, 180))


def _robot(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    w, h, leg = rng.uniform(7.5, 10), rng.uniform(11, 14), rng.uniform(6, 9)
    hw, hh, eye = rng.uniform(6, 8.4), rng.uniform(5, 6.4), rng.uniform(1.7, 2.4)
    panel, aerials = rng.choice(("screen", "dial", "bars")), rng.choice((1, 2))
    top = -leg - h
    for s in (-1, 1):
        pen.line([(s * w * 0.5, -leg), (s * w * 0.5, -2)], 4, shade(who.paint, 0.8))
    pen.line([(-w - 1.5, top + 3), (-w - 4, top + h * 0.8)], 3.6, who.second)
    hand = (w + 7, top - 8) if pose.posture == "waving" else (w + 4, top + h * 0.8)
    pen.line([(w + 1.5, top + 3), hand], 3.6, who.second)
    pen.rect(-w, top, w, -leg, who.paint, 1.5)
    head = Oval(0, top - hh - 1, hw, hh)
    for x in (0,) if aerials == 1 else (-hw * 0.5, hw * 0.5):
        pen.line([(x, head.y - hh), (x, head.y - hh - 4)], 1.4, shade(who.paint, 0.7))
        pen.circle(x, head.y - hh - 4.5, 1.7, who.second)
    pen.rect(-hw, head.y - hh, hw, head.y + hh, who.paint, 1.5)
    for s in (-1, 1):
        pen.circle(s * hw * 0.48, head.y - 0.6, eye, (255, 255, 255) if who.color != "white" else GLASS)
        pen.circle(s * hw * 0.48, head.y - 0.6, eye * 0.5, DARK)
    pen.rect(-hw * 0.5, head.y + hh * 0.5, hw * 0.5, head.y + hh * 0.5 + 1.3, DARK)
    if panel == "screen":
        pen.rect(-w * 0.6, top + 3, w * 0.6, top + h - 4, who.second, 1)
    elif panel == "dial":
        pen.circle(0, top + h * 0.5, min(w, h) * 0.42, who.second)
    else:
        for y in (0.25, 0.5, 0.75):
            pen.rect(-w * 0.6, top + h * y - 0.9, w * 0.6, top + h * y + 0.9, who.second)
    _wear(pen, pose, head, (0, top, w * 0.7))


@dataclass(frozen=True)
class Kind:
    """What captions can say of a kind. `accent` is the phrase for the second colour; animals speak of their pattern instead."""

    draw: Callable[[Pen, Identity, Pose], None]
    accent: str = ""
    postures: tuple[str, ...] = ("",)
    wears: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("plain",)


_COATS = ("plain", "spots", "stripes", "patches")

KINDS: dict[str, Kind] = {
    "dog": Kind(_dog, postures=("", "sitting"), wears=("collar", "hat", "scarf"), patterns=_COATS),
    "cat": Kind(_cat, postures=("", "sitting"), wears=("collar", "hat", "scarf"), patterns=_COATS),
    "bird": Kind(_bird, "{} wings", postures=("", "flying"), wears=("hat",)),
    "fish": Kind(_fish, "{} fins", wears=("hat",), patterns=("plain", "stripes", "spots")),
    "car": Kind(_car, "a {} stripe"),
    "boat": Kind(_boat, "{} sails"),
    "house": Kind(_house, "a {} roof"),
    "cup": Kind(_cup, "a {} pattern"),
    "teapot": Kind(_teapot, "a {} lid"),
    "backpack": Kind(_backpack, "a {} pocket"),
    "robot": Kind(_robot, "{} arms", postures=("", "waving"), wears=("hat", "scarf")),
}
