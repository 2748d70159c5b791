"""The eleven kinds of things in mini's world, and what captions can say of each.

A drawer draws from the thing's identity. All that captions never mention (proportions, the shape of ears, where the
spots lie) comes from the identity's seed; only pose and accessory differ between two pictures of one identity.
"""

from collections.abc import Callable
from dataclasses import dataclass

from raybooth.mini import animals, objects
from raybooth.mini.identity import Identity, Pose
from raybooth.mini.pen import Pen


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
    "dog": Kind(animals.dog, postures=("", "sitting"), wears=("collar", "hat", "scarf"), patterns=_COATS),
    "cat": Kind(animals.cat, postures=("", "sitting"), wears=("collar", "hat", "scarf"), patterns=_COATS),
    "bird": Kind(animals.bird, "{} wings", postures=("", "flying"), wears=("hat",)),
    "fish": Kind(animals.fish, "{} fins", wears=("hat",), patterns=("plain", "stripes", "spots")),
    "car": Kind(objects.car, "a {} stripe"),
    "boat": Kind(objects.boat, "{} sails"),
    "house": Kind(objects.house, "a {} roof"),
    "cup": Kind(objects.cup, "a {} pattern"),
    "teapot": Kind(objects.teapot, "a {} lid"),
    "backpack": Kind(objects.backpack, "a {} pocket"),
    "robot": Kind(objects.robot, "{} arms", postures=("", "waving"), wears=("hat", "scarf")),
}
