"""The drawers of mini's other things. A pen's origin is where the thing touches the ground; it looks to the right."""

import random

from raybooth.mini.identity import COLORS, DARK, GLASS, Identity, Pose, wear
from raybooth.mini.pen import Oval, Pen, shade


def car(pen: Pen, who: Identity, pose: Pose) -> None:
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


def boat(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    half, depth, mast = rng.uniform(16, 20), rng.uniform(8, 11), rng.uniform(22, 27)
    x, big, small, port = rng.uniform(-4, 2), rng.uniform(10, 14), rng.uniform(6, 9), rng.randint(1, 3)
    pen.line([(x, -depth), (x, -depth - mast)], 1.8, COLORS["brown"])
    pen.polygon([(x + 1.4, -depth - mast + 1), (x + big, -depth - 3), (x + 1.4, -depth - 3)], who.second)
    pen.polygon([(x - 1.6, -depth - mast + 5), (x - small, -depth - 3), (x - 1.6, -depth - 3)], shade(who.second, 0.86))
    pen.polygon([(-half, -depth), (half, -depth), (half - 6, -1), (-half + 5, -1)], who.paint)
    for i in range(port):
        pen.circle((i - (port - 1) / 2) * 8, -depth * 0.55, 1.9, GLASS)


def house(pen: Pen, who: Identity, pose: Pose) -> None:
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


def cup(pen: Pen, who: Identity, pose: Pose) -> None:
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


def teapot(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    rx, ry, spout = rng.uniform(11, 13.5), rng.uniform(9, 11), rng.uniform(5, 9)
    knob, ring, dotted = rng.uniform(1.8, 3), rng.uniform(5, 6.5), rng.random() < 0.5
    body = Oval(-1, -ry - 1, rx, ry)
    pen.circle(body.x - rx, body.y - 0.5, ring, shade(who.paint, 0.86))
    pen.circle(body.x - rx, body.y - 0.5, ring - 2.4, shade(who.paint, 0.55))
    pen.polygon(
        [body.at(0.7, 0.5), (body.x + rx + spout, body.y - ry * 0.75), (body.x + rx + spout - 3.4, body.y - ry * 0.95), body.at(0.72, -0.3)],
        shade(who.paint, 0.86),
    )
    pen.oval(body, who.paint)
    if dotted:
        for u in (-0.5, 0.0, 0.5):
            pen.circle(*body.at(u, 0.15), 2.2, who.second)
    pen.oval(Oval(body.x, body.y - ry * 0.86, rx * 0.58, 2.6), who.second)
    pen.circle(body.x, body.y - ry * 0.86 - 3.2, knob, who.second)


def backpack(pen: Pen, who: Identity, pose: Pose) -> None:
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


def robot(pen: Pen, who: Identity, pose: Pose) -> None:
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
    wear(pen, pose, head, (0, top, w * 0.7))
