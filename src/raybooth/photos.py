"""People's photographs to RGB squares: every format, orientation and colour space that cameras and phones write."""

import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from raybooth.errors import RayboothError

SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2"])
SMALLEST_SIDE = 32  # pixels; below it there is nothing to learn from
LARGEST_DOWNLOAD = 64 << 20  # bytes
HUB = "hf://"


@dataclass(frozen=True)
class Photo:
    """A photograph as it came: its name for messages, and the bytes of the file."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Gathered:
    photos: list[Photo]
    skipped: list[tuple[str, str]]  # (name, reason)


def is_remote(source: str) -> bool:
    return source.startswith(("http://", "https://", HUB))


def gather(sources: Iterable[str], fetch_dataset: Callable[[str], Path]) -> Gathered:
    """The photographs of `sources`: folders, files, http(s) URLs, hub datasets (`fetch_dataset` makes a folder of one).

    Files in a folder whose names are not a picture's are skipped, with the reason.

    Raises:
        RayboothError: if a source does not exist, there is no photograph at all, or two are the same.
    """
    photos: list[Photo] = []
    skipped: list[tuple[str, str]] = []
    for source in sources:
        if source.startswith(("http://", "https://")):
            photos.append(Photo(source, _download(source)))
        else:
            path = fetch_dataset(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source).expanduser()
            _add_local(path, photos, skipped)
    if not photos:
        given = ", ".join(sources) or "nothing"
        seen = "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
        raise RayboothError(f"There are no photographs in {given}{seen}. Give three to ten pictures of the subject with --photos.")
    refuse_duplicates(photos)
    return Gathered(photos, skipped)


def _add_local(path: Path, photos: list[Photo], skipped: list[tuple[str, str]]) -> None:
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_dir():
                    continue
                if file.name.startswith("."):
                    skipped.append((str(file), "a hidden file"))
                elif file.suffix.lower() not in SUFFIXES:
                    skipped.append((str(file), f"'{file.suffix or file.name}' is not a picture's file type"))
                else:
                    photos.append(Photo(str(file), file.read_bytes()))
        else:
            photos.append(Photo(str(path), path.read_bytes()))
    except FileNotFoundError:
        hint = f" (a dataset of the hub is written {HUB}{path})" if len(path.parts) == 2 and not path.is_absolute() else ""
        raise RayboothError(f"There is no photograph or folder {path}{hint}: check the path given with --photos.") from None
    except OSError as error:
        raise RayboothError(f"{error.filename or path} cannot be read: {error.strerror}.") from None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "raybooth"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            data = response.read(LARGEST_DOWNLOAD + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RayboothError(f"The photograph {url} cannot be fetched: {getattr(error, 'reason', error)}. Check the address, or give a file.") from None
    if len(data) > LARGEST_DOWNLOAD:
        raise RayboothError(f"The photograph {url} is larger than {LARGEST_DOWNLOAD >> 20} MiB: give a smaller one.")
    return data


def refuse_duplicates(photos: list[Photo]) -> None:
    first: dict[str, str] = {}
    for photo in photos:
        twin = first.setdefault(photo.sha256, photo.name)
        if twin is not photo.name:
            raise RayboothError(f"{photo.name} is the same photograph as {twin}: remove one, or the model would learn it twice as hard.")


def square(photo: Photo, side: int) -> Image.Image:
    """The upright sRGB picture of (side, side) pixels: shorter side to `side` by Lanczos, centre crop, alpha over white.

    Raises:
        RayboothError: if it cannot be read, or is too small or too large.
    """
    return _centre(_to_srgb(_opened(photo)), side)


def _centre(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def views(photo: Photo, side: int, crops: int, flip: bool, key: str) -> list[Image.Image]:
    """The centre square, `crops` random ones of 70 to 100% of the shorter side, and with `flip` the mirror image of each.

    What is random depends on `key` and the photograph's content alone.
    """
    image, random = _to_srgb(_opened(photo)), Random(f"{key} {photo.sha256}")
    squares = [_centre(image, side)]
    for _ in range(crops):
        edge = min(image.size) * random.uniform(0.7, 1)
        left, top = random.uniform(0, image.width - edge), random.uniform(0, image.height - edge)
        squares.append(image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge)))
    return squares + [ImageOps.mirror(s) for s in squares if flip]


def _opened(photo: Photo) -> Image.Image:
    _register_heif()
    try:
        image = Image.open(io.BytesIO(photo.data))
        if min(image.size) < SMALLEST_SIDE:
            raise RayboothError(f"{photo.name} is {image.width} x {image.height} pixels: give photographs of at least {SMALLEST_SIDE} pixels a side.")
        if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or 0):
            raise Image.DecompressionBombError
        image.load()
        return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise RayboothError(f"{photo.name} has more than 178 million pixels, too many to open safely: give a smaller copy.") from None
    except UnidentifiedImageError:
        raise RayboothError(f"{photo.name} is not a picture that can be read, whatever its name says: remove it or save it anew as JPEG or PNG.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise RayboothError(f"{photo.name} is damaged or cut off ({str(error).rstrip('.')}): copy it again from its source, or remove it.") from None


def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()  # idempotent; AVIF is Pillow's own


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.mode in ("P", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    profile = image.info.get("icc_profile")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: the plain conversion below is what viewers do too
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greyscale to 8 bits over the range of its kind."""
    values = np.asarray(image, dtype=np.float64)
    top = values.max(initial=0)
    full = 1.0 if image.mode == "F" and top <= 1 else 255.0 if top <= 255 and image.mode != "I;16" else 65535.0 if top <= 65535 else top
    return Image.fromarray(np.clip(values / full * 255 + 0.5, 0, 255).astype(np.uint8))


def png(image: Image.Image, **text: str) -> bytes:
    """The picture as PNG, with `text` as its text chunks. The same picture and text give the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], cell: int = 128) -> Image.Image:
    """One picture of many: a row each, under its title."""
    from PIL import ImageDraw, ImageFont

    gap, title = 6, 18
    columns = max((len(images) for _, images in rows), default=1)
    font = ImageFont.load_default(13)
    width = max(columns * (cell + gap) + gap, *(int(font.getlength(t)) + 2 * gap for t, _ in rows))
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + title) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (text, images) in enumerate(rows):
        top = gap + r * (cell + gap + title)
        draw.text((gap, top), text, "black", font)
        for c, image in enumerate(images):
            small = image.resize((cell, cell), Image.Resampling.LANCZOS if image.width > cell else Image.Resampling.NEAREST)
            sheet.paste(small, (gap + c * (cell + gap), top + title))
    return sheet
