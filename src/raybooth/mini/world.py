"""mini's world: an endless supply of pictures with captions, every one made from its seed.

A *scene* is what one picture shows. An *identity* is an individual with details that captions never mention; scenes of
one identity are what photographs of a subject are.
"""

import random
from dataclasses import dataclass

from PIL import Image

from raybooth.mini.identity import COLORS, Identity, Pose
from raybooth.mini.pen import Oval, Pen, reduced, shade
from raybooth.mini.places import PLACES, paint
from raybooth.mini.things import KINDS

SIZES = {"small": 0.88, "": 1.06, "big": 1.22}


@dataclass(frozen=True)
class Scene:
    """One picture: who, where and how. `seed` moves the small things (stars, waves, where exactly it stands)."""

    identity: Identity
    pose: Pose
    place: str
    size: str
    mirrored: bool
    seed: int


def make_identity(rng: random.Random, kind: str | None = None) -> Identity:
    kind = kind or rng.choice(list(KINDS))
    color, accent = rng.sample(list(COLORS), 2)
    return Identity(kind, color, accent, rng.choice(KINDS[kind].patterns), rng.getrandbits(32))


def make_scene(rng: random.Random, identity: Identity, worn: tuple[str, str] | None) -> Scene:
    """A scene of `identity` wearing `worn`; place, posture, size and direction at random."""
    posture = rng.choice(KINDS[identity.kind].postures)
    size = rng.choices(list(SIZES), (1, 2, 1))[0]
    return Scene(identity, Pose(posture, worn), rng.choice(list(PLACES)), size, rng.random() < 0.5, rng.getrandbits(32))


def make_worn(rng: random.Random, identity: Identity, chance: float = 0.5) -> tuple[str, str] | None:
    wears = KINDS[identity.kind].wears
    colors = [c for c in COLORS if c != identity.color]
    return (rng.choice(wears), rng.choice(colors)) if wears and rng.random() < chance else None


def random_scene(seed: int) -> Scene:
    """The scene number `seed` of the endless world."""
    rng = random.Random(f"scene {seed}")
    identity = make_identity(rng)
    return make_scene(rng, identity, make_worn(rng, identity))


def subject_scenes(seed: int, kind: str = "dog", n: int = 5) -> list[Scene]:
    """`n` photographs of one subject: the same identity with the same accessory, in different places."""
    rng = random.Random(f"subject {kind} {seed}")
    identity = make_identity(rng, kind)
    worn = make_worn(rng, identity)
    return [make_scene(rng, identity, worn) for _ in range(n)]


def render(scene: Scene) -> Image.Image:
    """The (64, 64) RGB picture of a scene."""
    rng = random.Random(scene.seed)
    canvas = paint(scene.place, rng)
    x, y = 32 + rng.uniform(-3, 3), 55 + rng.uniform(-1.5, 1.5)
    scale = SIZES[scene.size]
    red, green, blue = canvas.crop((4, canvas.height - 4, 5, canvas.height - 3)).tobytes()
    Pen(canvas, x, y, scale).oval(Oval(0, 0, 17, 2.6), shade((red, green, blue), 0.8))
    KINDS[scene.identity.kind].draw(Pen(canvas, x, y, scale, scene.mirrored), scene.identity, scene.pose)
    return reduced(canvas)


def _accent_phrase(identity: Identity) -> str:
    if identity.pattern != "plain":
        return f"with {identity.accent} {identity.pattern}"
    accent = KINDS[identity.kind].accent
    return f"with {accent.format(identity.accent)}" if accent else ""


def caption(scene: Scene, rng: random.Random | None = None, terse: float = 0.25) -> str:
    """What the picture shows, in words: everything that can be said or, with `rng`, some of it; a share of `terse` says little.

    For example "photo of a brown dog wearing a red collar in the snow".
    """
    detail = 0.3 if rng is not None and rng.random() < terse else 1.0

    def said(phrase: str, chance: float) -> list[str]:
        return phrase.split() if phrase and (rng is None or rng.random() < chance) else []

    who = scene.identity
    words = said(scene.size, 0.5 * detail) + said(who.color, 0.9 * detail) + [who.kind]
    words += said(_accent_phrase(who), 0.8 * detail)
    if scene.pose.worn:
        words += said("wearing a {1} {0}".format(*scene.pose.worn), 0.85 * detail)
    words += said(scene.pose.posture, 0.8 * detail) + said(scene.place, 0.9)
    words = said("a", 0.9) + words
    # "a orange hat" -> "an orange hat"
    words = ["an" if w == "a" and words[i + 1][0] in "aeiou" else w for i, w in enumerate(words)]
    return " ".join(["photo", "of", *words])
