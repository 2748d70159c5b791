"""Turns people's photographs into a run's instance images."""

import os
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from raybooth.disk import path_of
from raybooth.drawing import SHEET, resolution
from raybooth.manifest import digest
from raybooth.photos import SUFFIXES, Photo, refuse_duplicates, remarks, views
from raybooth.pictures import contact_sheet, png
from raybooth.session import Run
from raybooth.sources import Gathered, fetch, gather, is_remote
from raybooth.stage import Stage


class Photographs:
    """A run's photographs: `here`, on this machine, and `there`, which are fetched when they are first asked for."""

    def __init__(self, run: Run, scratch: Path):
        given = run.config.subject.photos
        self.remote, self._local = [s for s in given if is_remote(s)], [s for s in given if not is_remote(s)]
        self.places = [os.path.abspath(path_of(s, "subject.photos")) for s in self._local]
        self.held, self._root, self._scratch = run.manifest_of("instance-images"), run.workspace.root, scratch

    @property
    def have_gone(self) -> bool:
        """Whether all that is left of this machine's photographs are the squares in the storage, as when another machine continues the run."""
        known = self.held is not None and self.places and self.held["facts"].get("places") == self.places
        return bool(known) and not any(map(os.path.lexists, self.places))

    @cached_property
    def here(self) -> Gathered:
        return gather(self._local, self._root) if self._local or not self.remote else Gathered()

    @cached_property
    def there(self) -> Gathered:
        return fetch(self.remote, partial(_dataset, self._scratch)) if self.remote else Gathered()


def prepare_photos(run: Run, photos: Photographs) -> None:
    """Turn photographs into instance images, upright RGB squares of the base's resolution. Those of this machine come first."""
    subject, how = run.config.subject, views_of(run)
    if photos.have_gone and _are_as(run, photos, how):
        return run.say("instance-images: the photographs have gone; the pictures made of them are kept")
    # A remote source stands for itself: what was fetched once is kept, and nothing is fetched to see whether it changed.
    stage = run.workspace.stage("instance-images", {"photos": [p.sha256 for p in photos.here.photos], "remote": photos.remote, **how})
    _say_skipped(run, photos.here)
    held = stage.valid_manifest
    if held and stage.done():
        n = len(held["facts"]["pictures"])
        return run.say(f"instance-images: {n} picture{'s' * (n > 1)}, up to date")
    _say_skipped(run, photos.there)
    given = photos.here.photos + photos.there.photos
    images = [(photo, views(photo, how["resolution"], subject.crops, subject.flip, str(run.config.seed))) for photo in given]
    refuse_duplicates((photo, squares[0].tobytes()) for photo, squares in images)
    for line in remarks(given, how["resolution"]):
        run.say(f"instance-images: {line}")
    _write_instances(run, stage, images, {"skipped": photos.here.skipped + photos.there.skipped, "places": photos.places})


def _are_as(run: Run, photos: Photographs, how: dict[str, Any]) -> bool:
    """Whether the pictures in the storage are intact, from the same remote sources, and made as `how` says."""
    held = photos.held
    return held is not None and held["inputs"].items() >= {"remote": photos.remote, **how}.items() and run.workspace.intact("instance-images", held["outputs"])


def views_of(run: Run) -> dict[str, Any]:
    """The settings by which photographs become instance images."""
    subject = run.config.subject
    return {"resolution": resolution(run), "crops": [subject.crops, run.config.seed if subject.crops else None, subject.flip]}


def _dataset(scratch: Path, spec: str) -> Path:
    from raybooth import hub

    return hub.fetch_dataset(spec, scratch / digest(spec)[:16], SUFFIXES)


def _say_skipped(run: Run, found: Gathered, most: int = 20) -> None:
    for name, reason in found.skipped[:most]:
        run.say(f"instance-images: skipped {name}: {reason}")
    if len(found.skipped) > most:
        run.say(f"instance-images: skipped {len(found.skipped) - most} more; instance-images/manifest.json lists them all")


def _write_instances(run: Run, stage: Stage, images: list[tuple[Photo, list[Image.Image]]], facts: dict[str, Any]) -> None:
    """Write the instance images and their contact sheet: `02.png` is the third photograph, `02-1.png` its second view."""
    pictures = {f"{i:02d}{f'-{k}' if k else ''}.png": view for i, (_, views) in enumerate(images) for k, view in enumerate(views)}
    for name, image in pictures.items():
        stage.write(name, png(image))
    title = f"{run.config.subject.prompt}: what the model will see"
    stage.write(SHEET, png(contact_sheet([(title if not k else "", list(row)) for k, row in enumerate(zip(*(v for _, v in images), strict=True))])))
    sources = [{"name": photo.name, "sha256": photo.sha256} for photo, _ in images]
    stage.finish({"pictures": list(pictures), "sources": sources, **facts}, only=[*pictures, SHEET])
    what = f"{len(pictures)} views of " if len(pictures) > len(images) else ""
    run.say(f"instance-images: {what}{len(images)} photograph{'s' * (len(images) > 1)}; look at {stage.folder / SHEET}")
