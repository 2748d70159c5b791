"""The drawers of mini's animals. A pen's origin is where the thing touches the ground; it looks to the right."""

import random

from raybooth.mini.identity import COLORS, DARK, Identity, Pose, coat_pattern, wear
from raybooth.mini.pen import Oval, Pen, shade


def dog(pen: Pen, who: Identity, pose: Pose) -> None:
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
    coat_pattern(pen, body, who, rng)
    if pose.posture == "sitting":
        pen.oval(Oval(-6, -5.5, 6.5, 5.2), coat)
        pen.line([(7, -9), (8, -1.6)], 3.6, coat)
    else:
        for x in (-0.78, 0.5):
            pen.line([(body.x + length * x, body.y + 1), (body.x + length * x, -1.6)], 3.6, coat)
    neck = (head.x - 2.6, head.y + r * 0.95, 3.6)
    pen.line([(head.x - 2, head.y + 2), (neck[0] - 0.6, neck[1] + 2)], 6.5, coat)
    wear(pen, Pose(worn=pose.worn if pose.worn and pose.worn[0] != "hat" else None), head, neck)
    if ears == "pointed":
        pen.polygon(
            [(head.x - r * 0.9, head.y - r * 0.4), (head.x - r * 0.5, head.y - r - 4.6 * ear), (head.x + r * 0.35, head.y - r * 0.7)], accent if eared else dark
        )
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
        wear(pen, pose, head, neck)


def cat(pen: Pen, who: Identity, pose: Pose) -> None:
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
    coat_pattern(pen, body, who, rng)
    if pose.posture == "sitting":
        pen.oval(Oval(-5, -4.8, 6, 4.6), coat)
        for x in (3, 7):
            pen.line([(x, -9), (x, -1.4)], 3, coat)
    else:
        for x in (-0.78, 0.48):
            pen.line([(body.x + length * x, body.y + 1), (body.x + length * x, -1.4)], 3.2, coat)
    neck = (head.x - 1, head.y + r * 0.95, 4.6)
    if pose.worn and pose.worn[0] != "hat":
        wear(pen, pose, head, neck)
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
        wear(pen, pose, head, neck)


def bird(pen: Pen, who: Identity, pose: Pose) -> None:
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
    coat_pattern(pen, body, who, rng)
    pen.oval(head, who.paint)
    pen.circle(head.x + 1.8, head.y - 1, 2.0, (255, 255, 255))
    pen.circle(head.x + 2.2, head.y - 1, 1.2, DARK)
    if lift:
        pen.polygon([body.at(-0.35, -0.3), (body.x - 8, body.y - 17), (body.x + 1, body.y - 14), body.at(0.4, -0.3)], who.second)
    else:
        pen.oval(Oval(body.x - 1.5, body.y, rx * 0.55, ry * 0.48, 0.25), who.second)
    wear(pen, pose, head, (head.x - 2, head.y + r, 4))


def fish(pen: Pen, who: Identity, pose: Pose) -> None:
    rng = random.Random(who.seed)
    rx, ry = rng.uniform(13, 17), rng.uniform(7.5, 10.5)
    fin, tail, fork = rng.uniform(4, 8), rng.uniform(6, 9), rng.uniform(0, 4)
    body = Oval(1, -13, rx, ry)
    left = body.x - rx
    pen.polygon([(left + 3, -13), (left - tail, -13 - ry * 0.8), (left - tail + fork, -13), (left - tail, -13 + ry * 0.8)], who.second)
    pen.polygon([body.at(-0.5, -0.7), body.at(-0.3, -1 - fin / ry), body.at(0.4, -0.8)], who.second)
    pen.polygon([body.at(-0.3, 0.8), body.at(-0.3, 0.9 + fin * 0.7 / ry), body.at(0.2, 0.85)], who.second)
    pen.oval(body, who.paint)
    coat_pattern(pen, Oval(body.x - 2, body.y, rx * 0.8, ry), who, rng)
    pen.circle(body.x + rx * 0.62, body.y - ry * 0.25, 2.6, (255, 255, 255))
    pen.circle(body.x + rx * 0.68, body.y - ry * 0.25, 1.5, DARK)
    pen.line([body.at(0.95, 0.3), body.at(0.72, 0.36)], 1.2, DARK)
    wear(pen, pose, Oval(body.x + rx * 0.45, body.y, rx * 0.4, ry * 0.86), (0, 0, 0))
