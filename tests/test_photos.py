import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFont, ImageOps, PngImagePlugin

from raybooth.errors import RayboothError
from raybooth.photos import Photo, remarks, square, views
from raybooth.pictures import FONTS, contact_sheet, png

RED = (200, 30, 40)


def saved(image: Image.Image, kind: str, **how) -> Photo:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return Photo(f"a.{kind.lower()}", buffer.getvalue())


def halves(mode: str = "RGB") -> Image.Image:
    """Left half black, right half white, 120 x 60."""
    image = Image.new("L", (120, 60), 0)
    image.paste(255, (60, 0, 120, 60))
    return image.convert(mode)


@pytest.mark.parametrize(
    "photo",
    [
        saved(Image.new("RGB", (90, 70), RED), "PNG"),
        saved(Image.new("RGB", (90, 70), RED), "WEBP", lossless=True),
        saved(Image.new("RGB", (90, 70), RED), "TIFF"),
        saved(Image.new("RGB", (90, 70), RED), "BMP"),
        saved(Image.new("RGB", (90, 70), RED), "AVIF", quality=95),
        saved(Image.new("RGB", (90, 70), RED), "JPEG", quality=95),
        saved(Image.new("RGB", (90, 70), RED).quantize(4), "PNG"),
        saved(Image.new("RGB", (90, 70), RED).quantize(4), "GIF"),
        saved(Image.new("RGB", (90, 70), RED).convert("RGBA"), "PNG"),
        saved(Image.new("RGB", (90, 70), RED).convert("CMYK"), "JPEG", quality=95),
    ],
    ids=lambda p: p.name,
)
def test_every_format_comes_out_as_the_same_rgb_square(photo: Photo):
    image = square(photo, 48)
    assert (image.mode, image.size) == ("RGB", (48, 48))
    assert np.abs(np.asarray(image, int) - RED).max() <= 8


def test_heic_from_a_phone_is_read():
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (96, 64), RED)).save(buffer, quality=95)
    assert np.abs(np.asarray(square(Photo("a.heic", buffer.getvalue()), 32), int) - RED).max() <= 8


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = np.asarray(square(saved(halves(), "JPEG", exif=exif, quality=95), 60), int)
    assert turned[:, :25].min() > 240
    assert turned[:, -25:].max() < 15


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (64, 64), (*RED, 0))
    assert np.asarray(square(saved(image, "PNG"), 32)).min() == 255
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([200, 30, 40] * 4)
    assert np.asarray(square(saved(palette, "PNG", transparency=0), 32)).min() == 255
    grey = Image.new("LA", (64, 64), (0, 0))
    assert np.asarray(square(saved(grey, "PNG"), 32)).min() == 255


def test_a_grey_that_is_not_there_is_white_in_sixteen_bits_too():
    values = np.full((32, 32), 40000, np.uint16)
    values[:16] = 7
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=7)
    found = np.asarray(square(Photo("grey.png", file.getvalue()), 32))
    assert found[:15].min() == 255
    assert abs(int(found[17:].mean()) - 40000 / 257) < 2


def test_sixteen_bits_keep_their_tones():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = np.asarray(square(saved(Image.fromarray(ramp), "PNG"), 64), float)
    assert np.abs(image[..., 0] - ramp / 257).max() <= 1


def test_an_embedded_profile_is_honoured():
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    assert np.abs(np.asarray(square(saved(Image.new("RGB", (64, 64), RED), "PNG", icc_profile=swapped.tobytes()), 32), int) - RED).max() <= 1
    broken = saved(Image.new("RGB", (64, 64), RED), "PNG", icc_profile=b"not a profile")
    assert np.asarray(square(broken, 32))[0, 0].tolist() == list(RED)


def test_the_shorter_side_is_fitted_and_the_centre_kept():
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (60, 0, 140, 100))
    out = np.asarray(square(saved(image, "PNG"), 50), int)[..., 0]
    assert out[:, 8:42].min() > 240
    assert out[:, :3].max() < 15
    assert out[:, -3:].max() < 15


def test_views_are_crops_and_mirror_images_that_depend_on_their_key_alone():
    ramp = Image.merge("RGB", [Image.linear_gradient("L").rotate(90).resize((200, 100))] * 3)  # darker to brighter, left to right or the reverse
    photo = saved(ramp, "PNG")
    centre, *crops = (np.asarray(view, int)[..., 0] for view in views(photo, 32, 2, False, "7"))
    mirrored = np.asarray(views(photo, 32, 0, True, "7")[1])[..., 0]
    assert (centre == np.asarray(square(photo, 32))[..., 0]).all()
    assert (mirrored == centre[:, ::-1]).all()
    span = abs(centre[0, -1] - centre[0, 0])  # of the ramp over 100 of 200 pixels
    for crop in crops:
        assert 0.65 * span <= abs(crop[0, -1] - crop[0, 0]) <= 1.05 * span
        assert (crop != centre).any()
    again, other = views(photo, 32, 2, False, "7"), views(photo, 32, 2, False, "8")
    assert (np.asarray(again[1])[..., 0] == crops[0]).all()
    assert (np.asarray(other[1])[..., 0] != crops[0]).any()


def test_png_text_and_bytes_are_stable():
    image = Image.new("RGB", (8, 8), RED)
    data = png(image, prompt="fünf", seed="3")
    assert data == png(image, prompt="fünf", seed="3")
    assert Image.open(io.BytesIO(data)).info == {"prompt": "fünf", "seed": "3"}


def test_a_contact_sheet_shows_every_picture():
    images = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    sheet = contact_sheet([("first", images), ("second", images[:1])], cell=16)
    assert {c for _, c in sheet.getcolors(10_000) or []} >= {(255, 0, 0), (0, 255, 0), (0, 0, 255)}


def test_a_damaged_photograph_is_named(photos: Path):
    data = (photos / "0.png").read_bytes()
    with pytest.raises(RayboothError, match=r"0\.png is damaged or cut off"):
        square(Photo("0.png", data[: len(data) // 2]), 32)


@pytest.mark.parametrize(("name", "spoil"), [("a.avif", b"\xff"), ("a.heic", None)])
def test_what_a_decoder_says_is_part_of_one_sentence(name: str, spoil: bytes | None):
    """Pillow's AVIF raises RuntimeError, and libheif speaks in two lines."""
    import pillow_heif

    buffer, image = io.BytesIO(), Image.effect_noise((96, 96), 60).convert("RGB")
    if name.endswith("avif"):
        image.save(buffer, "AVIF")
    else:
        pillow_heif.from_pillow(image).save(buffer)
    data = buffer.getvalue()
    start = data.index(b"mdat") + 4
    damaged = data[:start] + spoil * (len(data) - start) if spoil else data[: len(data) // 2]
    with pytest.raises(RayboothError, match=rf"^{name} is damaged or cut off \(.*\): copy it again") as refused:
        square(Photo(name, damaged), 32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tag", [ExifTags.Base.YCbCrPositioning, ExifTags.Base.XResolution, ExifTags.Base.ImageWidth])
def test_odd_words_of_a_camera_are_no_damage(tag: int):
    """Its EXIF says which side is up, and something else that is of no kind it may have."""
    told = sorted([(ExifTags.Base.Orientation, 3, b"\6\0\0\0", 1), (tag, 2, b"odd\0", 4)])
    entries = b"".join(struct.pack("<HHI", key, kind, count) + value for key, kind, value, count in told)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(told)) + entries + bytes(4)
    with_it, without = (square(saved(halves(), "JPEG", exif=e), 32) for e in (exif, _turned().tobytes()))
    assert np.array_equal(np.asarray(with_it), np.asarray(without))


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def test_torn_words_of_a_camera_are_read_past_without_a_word():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "x" * 100
    torn = saved(halves(), "JPEG", exif=exif.tobytes()[:-90], quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert square(torn, 60).size == (60, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows_own(orientation: int):
    exif = _turned()
    exif[ExifTags.Base.Orientation] = orientation
    photo = saved(halves().rotate(20), "PNG", exif=exif.tobytes())
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(photo.data)))
    assert np.array_equal(np.asarray(square(photo, 64)), np.asarray(square(saved(theirs.copy(), "PNG"), 64)))


@pytest.mark.parametrize("spoil", [lambda v: v, lambda v: v * 1.02, lambda v: np.where(v > 0.99, np.nan, v)])
def test_floats_keep_their_tones(spoil: Callable[[np.ndarray], np.ndarray]):
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    grey = np.asarray(square(saved(Image.fromarray(spoil(ramp).astype(np.float32)), "TIFF"), 64))[32, :, 0]
    assert np.abs(grey[:60].astype(float) - np.linspace(0, 255, 64)[:60]).max() < 8


def test_a_program_is_no_photograph():
    """PostScript, which Pillow hands to Ghostscript."""
    program = saved(Image.new("RGB", (64, 64)), "EPS")
    with pytest.raises(RayboothError, match="is not a picture that can be read"):
        square(Photo("a.png", program.data), 64)


def test_what_programs_note_of_their_edits_is_no_damage():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "edit " * 500_000, zip=True)
    plain, noted = (square(saved(halves(), "PNG", **how), 32) for how in ({}, {"pnginfo": info, "icc_profile": bytes(2_000_000)}))
    assert plain.tobytes() == noted.tobytes()


def test_a_title_of_two_lines_is_one():
    image = Image.new("RGB", (8, 8))
    assert contact_sheet([("one\ntwo", [image])]).tobytes() == contact_sheet([("one two", [image])]).tobytes()


def test_letters_of_other_languages_are_written_where_there_is_a_font():
    if not any(map(_has, FONTS)):
        pytest.skip("no such font on this machine")
    sheets = {contact_sheet([(word, [Image.new("RGB", (8, 8))])]).tobytes() for word in ("Ü", "Ж", "é", "Ω")}
    assert len(sheets) == 4, "boxes are all alike"


def _has(font: str) -> bool:
    try:
        return bool(ImageFont.truetype(font, 12))
    except OSError:
        return False


def test_a_long_title_is_cut():
    assert contact_sheet([("very " * 1_000_000, [Image.new("RGB", (8, 8))])]).width < 2000


def test_what_a_square_does_not_show_is_told(tmp_path: Path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (400, 100)).save(tmp_path / "wide.png")
    Image.new("RGB", (120, 90)).save(tmp_path / "usual.jpg")
    photos = [Photo(p.name, p) for p in sorted(tmp_path.iterdir())]
    assert remarks(photos, 90) == [
        "moves.gif has 2 frames, of which the first is taken",
        "wide.png is 400 x 100 pixels, of which the middle 100 x 100 are taken",
        "1 of 3 photographs is smaller than 90 pixels, and enlarged",
    ]
    assert remarks(photos[1:2], 64) == []
