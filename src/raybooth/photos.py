"""Turns people's photographs into RGB squares: every format, orientation and colour space that cameras and phones write."""

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from raybooth.errors import RayboothError, reason
from raybooth.files import file_digest

SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2"])
FORMATS = frozenset(["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "HEIF", "AVIF", "JPEG2000"])
"""Formats that are read, whatever a file is called. Pillow knows others, of which it hands PostScript to another program."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns a picture upright, by its EXIF orientation."""
WIDEST = 3  # ratio of the sides, up to which the middle square loses little of the subject
SMALLEST_SIDE = 32  # pixels; below it there is nothing to learn from


@dataclass(frozen=True)
class Photo:
    """A photograph as it came: its name for messages, and the bytes of the file, or where to read them."""

    name: str
    source: bytes | Path

    @property
    def data(self) -> bytes:
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source

    @cached_property
    def sha256(self) -> str:
        return file_digest(self.source) if isinstance(self.source, Path) else hashlib.sha256(self.source).hexdigest()


def refuse_duplicates(contents: Iterable[tuple[Photo, str | bytes]]) -> None:
    """Refuse two of the same photograph; each comes with content that only its twin shares."""
    first: dict[str | bytes, Photo] = {}
    for photo, content in contents:
        twin = first.setdefault(content, photo)
        if twin is not photo:
            raise RayboothError(f"{photo.name} is the same photograph as {twin.name}: remove one, or the model would learn it twice as hard.")


def square(photo: Photo, side: int) -> Image.Image:
    """The upright sRGB picture of (side, side) pixels: shorter side to `side` by Lanczos, centre crop, alpha over white.

    Raises:
        RayboothError: if it cannot be read, or is too small or too large.
    """
    return _centre(_opened(photo), side)


def remarks(photos: Sequence[Photo], side: int) -> list[str]:
    """What people should know about how their photographs become squares of `side` pixels."""
    lines, small, n = [], 0, len(photos)
    for photo in photos:
        _register_heif()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            image = _recognised(photo.data)
            shorter, longer = sorted(image.size)
            small += shorter < side
            frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # cameras write MPO, and its other frames are for programs
            lines.append(f"{photo.name} has {frames} frames, of which the first is taken")
        if longer > WIDEST * shorter:
            lines.append(f"{photo.name} is {image.width} x {image.height} pixels, of which the middle {shorter} x {shorter} are taken")
    if small:
        lines.append(f"{small} of {n} photograph{'s' * (n > 1)} {'is' if small == 1 else 'are'} smaller than {side} pixels, and enlarged")
    return lines


def _centre(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def views(photo: Photo, side: int, crops: int, flip: bool, key: str) -> list[Image.Image]:
    """The centre square, `crops` random ones of 70 to 100% of the shorter side, and with `flip` the mirror image of each.

    What is random depends on `key` and the photograph's content alone.
    """
    image, random = _opened(photo), Random(f"{key} {photo.sha256}")
    squares = [_centre(image, side)]
    for _ in range(crops):
        edge = min(image.size) * random.uniform(0.7, 1)
        left, top = random.uniform(0, image.width - edge), random.uniform(0, image.height - edge)
        squares.append(image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge)))
    return squares + [ImageOps.mirror(s) for s in squares if flip]


def _opened(photo: Photo) -> Image.Image:
    _register_heif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about EXIF, of which only the orientation is needed
        return _decoded(photo, photo.data)


def _decoded(photo: Photo, data: bytes) -> Image.Image:
    try:
        image = _recognised(data)
        if min(image.size) < SMALLEST_SIDE:
            raise RayboothError(f"{photo.name} is {image.width} x {image.height} pixels: give photographs of at least {SMALLEST_SIDE} pixels a side.")
        if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or 0):
            raise Image.DecompressionBombError
        image.load()
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(data)
        return _to_srgb(_upright(image))
    except RayboothError:
        raise
    except Image.DecompressionBombError:
        raise RayboothError(f"{photo.name} has more than 178 million pixels, too many to open safely: give a smaller copy.") from None
    except UnidentifiedImageError:
        raise RayboothError(f"{photo.name} is not a picture that can be read, whatever its name says: remove it or save it anew as JPEG or PNG.") from None
    except MemoryError:
        raise RayboothError(f"{photo.name} is too large for the memory of this machine: give a smaller copy.") from None
    except Exception as error:  # decoders raise whatever they please: RuntimeError, SyntaxError, struct.error
        raise RayboothError(f"{photo.name} is damaged or cut off ({reason(error)}): copy it again from its source, or remove it.") from None


def _recognised(data: bytes) -> Image.Image:
    Image.init()
    # Allow large profiles and programs' notes on their edits, for the whole process: Pillow has no other way.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused later
        return Image.open(io.BytesIO(data), formats=sorted(FORMATS & Image.OPEN.keys()))


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation, if readable. Pillow's exif_transpose() also rewrites the rest, and fails on what some cameras put there."""
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG that is damaged in the middle, or cut off and filled up: libjpeg only warns of it, and Pillow shows grey or shifted blocks.

    Raises:
        ValueError: in libjpeg's words.
    """
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_factor=1, strict=True)
    except ValueError as error:
        # Some cameras write extra bytes after whole data. What this decoder does not know, such as CMYK, Pillow may.
        if str(error).startswith(("Corrupt JPEG data", "Premature end of JPEG")) and "extraneous bytes" not in str(error):
            raise


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
    """16-bit, 32-bit or floating-point greyscale in 8 bits, over the range of its kind. Floats of 0 to 1 may have highlights a little above 1."""
    values = np.nan_to_num(np.array(image, dtype=np.float32), copy=False, posinf=0, neginf=0)
    top = values.max(initial=0)
    full = 1.0 if image.mode == "F" and top <= 2 else 255.0 if top <= 255 and image.mode != "I;16" else 65535.0 if top <= 65535 else top
    grey = Image.fromarray(np.clip(values / full * 255 + 0.5, 0, 255).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # the value that a PNG says is transparent
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
