"""The known model families, and which of them a model folder belongs to."""

from pathlib import Path

from raybooth.errors import RayboothError
from raybooth.families import flux, sd, sd3, sdxl
from raybooth.families.base import Facts, Family, Loaded
from raybooth.families.folder import read_index

FAMILIES = (sd.FAMILY, sdxl.FAMILY, sd3.FAMILY, flux.FAMILY)

__all__ = ["FAMILIES", "Facts", "Family", "Loaded", "family_of", "mini_folder"]


def family_of(folder: Path, source: str | None = None) -> Family:
    """The family of a model folder; `source` is what the user knows it by, if that is not the folder.

    Raises:
        RayboothError: if it is not a diffusers folder, or its family is not known.
    """
    name = read_index(folder).get("_class_name", "pipeline without a name")
    for family in FAMILIES:
        if family.pipeline == name:
            return family
    known = "; ".join(f.name for f in FAMILIES)
    raise RayboothError(f"The model {source or folder} is a {name}, a family that is not known; known are: {known}.")


def mini_folder() -> Path:
    """The folder of the embedded base model."""
    from raybooth.mini import FOLDER

    return FOLDER
