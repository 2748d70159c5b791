"""The subjects and prompts of the DreamBooth paper (Ruiz et al. 2023, section 4.1 and supplement), and its scores."""

from dataclasses import dataclass
from pathlib import Path

from raybooth.errors import RayboothError
from raybooth.photos import SUFFIXES

KINDS = ("live", "object")
LISTING = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")
_ANYWHERE = (
    "in the jungle", "in the snow", "on the beach", "on a cobblestone street", "on top of pink fabric", "on top of a wooden floor",
    "with a city in the background", "with a mountain in the background", "with a blue house in the background", "on top of a purple rug in a forest",
)  # fmt: skip
_OBJECTS = (
    "with a wheat field in the background", "with a tree and autumn leaves in the background", "with the Eiffel Tower in the background",
    "floating on top of water", "floating in an ocean of milk", "on top of green grass with sunflowers around it", "on top of a mirror",
    "on top of the sidewalk in a crowded street", "on top of a dirt road", "on top of a white rug",
)  # fmt: skip
_LIVE = (
    "wearing a red hat", "wearing a santa hat", "wearing a rainbow scarf", "wearing a black top hat and a monocle", "in a chef outfit",
    "in a firefighter outfit", "in a police outfit", "wearing pink glasses", "wearing a yellow shirt", "in a purple wizard outfit",
)  # fmt: skip
_LOOKS = tuple(f"a {look} {{subject}}" for look in ("red", "purple", "shiny", "wet", "cube shaped"))

OBJECT_PROMPTS = (*(f"a {{subject}} {x}" for x in (*_ANYWHERE, *_OBJECTS)), *_LOOKS)
LIVE_PROMPTS = (*(f"a {{subject}} {x}" for x in (*_ANYWHERE, *_LIVE)), *_LOOKS)

PUBLISHED = {
    "the photographs themselves (paper)": (0.774, 0.885, None),
    "DreamBooth, Stable Diffusion (paper)": (0.668, 0.803, 0.305),
    "Textual Inversion, Stable Diffusion (paper)": (0.569, 0.780, 0.255),
}
"""DINO, CLIP-I and CLIP-T of the paper's table 1."""


@dataclass(frozen=True)
class Subject:
    name: str
    class_name: str
    photos: Path
    prompts: tuple[str, ...]


def subjects_of(folder: Path) -> list[Subject]:
    """The subjects in a copy of the DreamBooth dataset: one subfolder of photographs each, their classes in `prompts_and_classes.txt`.

    Its lines are `folder,class`; a third word, `live` or `object`, chooses the prompts (default: live for cat and dog, else object).

    Raises:
        RayboothError: if there are none, or a subject's class is not given.
    """
    if not (folder / LISTING).is_file() and (folder / "dataset" / LISTING).is_file():  # as in a clone of google/dreambooth
        folder = folder / "dataset"
    listing = folder / LISTING
    if not listing.is_file():
        raise RayboothError(f"--subjects {folder} has no {LISTING}: give a copy of the DreamBooth dataset, or write it: lines 'folder,class'.")
    said = _said(listing)
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and any(f.suffix.lower() in SUFFIXES for f in p.iterdir()))
    if not found:
        raise RayboothError(f"--subjects {folder} has no subfolders with photographs: give a copy of the DreamBooth dataset.")
    if absent := [p.name for p in found if not said.get(p.name, [""])[0]]:
        raise RayboothError(f"{listing} does not say the class of {', '.join(absent)}: add a line '{absent[0]},CLASS'.")
    for name, kind in ((p.name, said[p.name][1]) for p in found if len(said[p.name]) > 1):
        if kind.lower() not in ("", *KINDS):
            raise RayboothError(f"{listing} says '{kind}' of {name}: write {' or '.join(KINDS)}, for the prompts of the one kind or the other.")
    return [Subject(p.name, said[p.name][0], p, _prompts(*said[p.name])) for p in found]


def _said(listing: Path) -> dict[str, list[str]]:
    """The class and whatever follows it, by folder. Lines of another kind, such as the prompts in the paper's file, name no folder."""
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RayboothError(f"{listing} is not text in UTF-8: save it as such.") from None
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return {folder: rest for folder, *rest in cells if rest}


def _prompts(class_name: str, kind: str = "", *_: str) -> tuple[str, ...]:
    live = kind.lower() == "live" or (kind.lower() != "object" and class_name.lower() in LIVE_CLASSES)
    return LIVE_PROMPTS if live else OBJECT_PROMPTS
