"""Where photographs come from: what counts, what counts once, what is passed over and why."""

import http.client
import io
import json
import os
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from raybooth import sources
from raybooth.cli import main
from raybooth.errors import RayboothError
from raybooth.sources import fetch, gather


def picture(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (grey, 0, 0)).save(path)
    return path


def names(found: sources.Gathered, folder: Path) -> list[str]:
    return [os.path.relpath(p.name, folder) for p in found.photos]


def no_hub(spec: str) -> Path:
    raise AssertionError(spec)


def test_what_is_no_picture_in_a_folder_is_skipped_with_its_reason(tmp_path: Path):
    picture(tmp_path / "b.png", 0).rename(tmp_path / "b.PNG")
    picture(tmp_path / ".thumbnails" / "b.png", 1)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    found = gather([str(tmp_path)])
    assert names(found, tmp_path) == ["b.PNG"]
    assert {Path(n).name: r for n, r in found.skipped} == {
        "notes.txt": "'.txt' is not a picture's file type", ".DS_Store": "a hidden file", ".thumbnails": "a hidden folder",
    }  # fmt: skip


def test_prepare_names_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture(tmp_path / "photos" / "a.png", 0)
    for i in range(23):
        (tmp_path / "photos" / f"n{i:02d}.txt").write_text("x")
    storage = tmp_path / "run"
    assert main(["prepare", "--photos", str(tmp_path / "photos"), "--class", "dog", "--base", "mini", "--storage", str(storage)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said[0] == f"instance-images: skipped {tmp_path / 'photos' / 'n00.txt'}: '.txt' is not a picture's file type"
    assert said[20:] == ["instance-images: skipped 3 more; instance-images/manifest.json lists them all"]
    manifest = json.loads((storage / "instance-images" / "manifest.json").read_text())
    assert [Path(name).name for name, _ in manifest["facts"]["skipped"]] == [f"n{i:02d}.txt" for i in range(23)]


def test_files_come_in_the_order_of_their_paths(tmp_path: Path):
    """As they always have: instance images and the digest of a finished storage follow it."""
    for i, name in enumerate(("b/x.png", "b.png", "a/z/y.png", "a/b.png", "c.png")):
        picture(tmp_path / name, i)
    assert names(gather([str(tmp_path)]), tmp_path) == sorted((p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")), key=lambda n: n.split("/"))


def test_folders_files_and_datasets_add_up(tmp_path: Path):
    picture(tmp_path / "a" / "x.png", 0)
    picture(tmp_path / "one.png", 1)
    picture(tmp_path / "b" / "deep" / "x.png", 2)
    assert names(gather([str(tmp_path / "a"), str(tmp_path / "one.png")]), tmp_path) == ["a/x.png", "one.png"]
    assert [p.name for p in fetch(["hf://me/dog"], {"me/dog": tmp_path / "b"}.__getitem__).photos] == ["hf://me/dog/deep/x.png"]


def test_a_file_counts_once_however_it_is_come_to(tmp_path: Path):
    one = picture(tmp_path / "dog" / "a.png", 0)
    picture(tmp_path / "elsewhere" / "b.png", 1)
    (tmp_path / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "dog")
    found = gather([str(tmp_path / "dog"), str(one), f"{tmp_path}/dog/", str(tmp_path / "elsewhere")])
    assert names(found, tmp_path) == ["dog/a.png", "dog/linked/b.png"]
    assert not found.skipped


def test_a_url_counts_once(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(url: str) -> bytes:
        asked.append(url)
        return b"picture"

    monkeypatch.setattr(sources, "_download", download)
    assert len(fetch(["http://h/a.png", "".join(["http://h/", "a.png"])], no_hub).photos) == 1
    assert len(asked) == 1
    with pytest.raises(RayboothError, match=r"http://h/b\.png is the same photograph as http://h/a\.png"):
        fetch(["http://h/a.png", "http://h/b.png"], no_hub)


@pytest.mark.parametrize("error", [http.client.BadStatusLine("SSH-2.0"), http.client.IncompleteRead(b"", 9)])
def test_what_is_no_http_or_breaks_off_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def answer(*_: object, **__: object) -> io.BytesIO:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(RayboothError, match=r"http://h/a\.png cannot be fetched"):
        fetch(["http://h/a.png"], no_hub)


def test_a_server_that_drips_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    """A byte now and then is no timeout of a socket's."""

    class Dripping(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return b"."

    monkeypatch.setattr(sources, "LONGEST_DOWNLOAD", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Dripping())
    with pytest.raises(RayboothError, match=r"http://h/a\.png cannot be fetched: it takes longer than 0\.2 seconds"):
        fetch(["http://h/a.png"], no_hub)


def test_blanks_and_letters_of_any_language_in_a_url_are_encoded(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def answer(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        asked.append(request.full_url)
        return io.BytesIO(b"picture")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    fetch(["http://h/my dög%20.png?a=1&b=[2]"], no_hub)
    assert asked == ["http://h/my%20d%C3%B6g%20.png?a=1&b=[2]"]


@pytest.mark.parametrize(
    ("url", "asked"), [("http://例え.テスト:8000/ä.png", "http://xn--r8jz45g.xn--zckzah:8000/%C3%A4.png"), ("HTTP://[::1]:9/a", "http://[::1]:9/a")]
)
def test_a_host_in_any_language_is_asked_by_its_name_in_ascii(url: str, asked: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[urllib.request.Request] = []

    def answer(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        seen.append(request)
        return io.BytesIO(b"picture")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    fetch([url], no_hub)
    assert [request.full_url for request in seen] == [asked]
    assert seen[0].host.isascii()


def test_an_at_sign_behind_the_host_is_no_password(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def answer(request: urllib.request.Request, **_: object) -> io.BytesIO:
        seen.append(request.full_url)
        raise OSError("far enough")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(RayboothError, match="cannot be fetched"):
        fetch(["http://127.0.0.1:9?q=a@b"], no_hub)
    assert seen == ["http://127.0.0.1:9?q=a@b"]


@pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1:9/a.png", "https://secret@h/a@b.png"])
def test_a_password_in_an_address_is_neither_sent_nor_printed(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=AssertionError))
    with pytest.raises(RayboothError, match=r"\*\*\*@.* has a name and a password in its address.*download it") as said:
        fetch([url], no_hub)
    assert "secret" not in str(said.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://bucket", "not fetched from s3://, as in s3://bucket: download them first, and give files, folders"),
        ("ftp://me:secret@h//x/a.png", "not fetched from ftp://, as in ftp://***@h//x/a.png: download them first"),
        ("file:///home/me/my%20dog", "file:///home/me/my%20dog is no path: write it without file://, as /home/me/my dog."),
        ("www.example.com/a.png", "no photograph or folder www.example.com/a.png (an address is written https://www.example.com/a.png)"),
        ("me/dog", "(a dataset of the hub is written hf://me/dog)"),
        ("./a/b/c.png", "no photograph or folder a/b/c.png: check the path"),
    ],
)
def test_an_address_of_a_kind_that_is_not_taken_is_told_from_a_path(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RayboothError) as told:
        gather([source])
    assert said in str(told.value)


def test_a_path_may_look_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "s3:" / "bucket" / "a.png", 0)
    assert len(gather(["s3://bucket"]).photos) == 1


def test_of_a_stages_folder_only_its_pictures_are_learnt_and_what_is_added_to_them(tmp_path: Path):
    for i, name in enumerate(("00.png", "contact-sheet.png", "mine.png")):
        picture(tmp_path / "instance-images" / name, i)
    described = {"bytes": 1, "sha256": ""}
    manifest = {"digest": "", "inputs": {}, "outputs": {"00.png": described, "contact-sheet.png": described}, "facts": {"pictures": ["00.png"]}}
    (tmp_path / "instance-images" / "manifest.json").write_text(json.dumps(manifest))
    found = gather([str(tmp_path / "instance-images")])
    assert names(found, tmp_path) == ["instance-images/00.png", "instance-images/mine.png"]
    assert ("contact-sheet.png", "made by raybooth") in [(Path(n).name, reason) for n, reason in found.skipped]


def test_far_too_many_are_refused_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MOST", 3)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"all the same")
    with pytest.raises(RayboothError, match="more than 3 photographs"):
        gather([str(tmp_path)])


def prepared(photos: Path, storage: Path) -> list[str]:
    """Names of the photographs in a storage that was prepared on mini."""
    assert main(["prepare", "--photos", str(photos), "--class", "dog", "--base", "mini", "--storage", str(storage)]) == 0
    facts = json.loads((storage / "instance-images" / "manifest.json").read_text())["facts"]
    return [Path(s["name"]).name for s in facts["sources"]]


@pytest.mark.parametrize("where", [".", "raybooth-run"])
def test_what_raybooth_has_made_among_the_photographs_is_not_learnt(where: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    for name in ("c.png", "contact-sheet.png"):  # as class-images leaves them, of another run in the same place
        picture(tmp_path / "class-images" / name, 2)
    (tmp_path / "class-images" / "manifest.json").write_text('{"digest": "", "inputs": {}, "facts": {}, "outputs": {}}')
    if where != ".":
        picture(tmp_path / where / "before-after.png", 3)
        (tmp_path / where / "config.json").write_text('{"subject": {}, "base": {}, "finetune": {}, "storage": "."}')
    assert prepared(tmp_path, tmp_path / where) == ["a.png", "b.png"]
    capsys.readouterr()
    assert prepared(tmp_path, tmp_path / where) == ["a.png", "b.png"]
    assert "instance-images: 2 pictures, up to date" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_learnt_from(tmp_path: Path):
    picture(tmp_path / "a.png", 0)
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/ph\xf6to.png")
    assert prepared(tmp_path, tmp_path / "run") == ["ph\ufffdto.png"]


def prepares(storage: Path, *more: str) -> int:
    return main(["prepare", "--class", "dog", "--base", "mini", "--storage", str(storage), *more])


def test_when_the_photographs_have_gone_their_pictures_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As on another machine, which takes over from one that was lost."""
    photos, storage = tmp_path / "photos", tmp_path / "run"
    picture(photos / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    given = ["--photos", str(photos), str(tmp_path / "b.png")]
    assert prepares(storage, *given) == 0
    made = {p.name: p.read_bytes() for p in (storage / "instance-images").iterdir()}
    photos.rename(tmp_path / "elsewhere")
    assert prepares(storage, *given) == 2, "one of the two is still there: this is another set of photographs"
    (tmp_path / "b.png").unlink()
    capsys.readouterr()
    assert prepares(storage, *given) == 0
    assert "the photographs have gone; the pictures made of them are kept" in capsys.readouterr().err
    assert main(["prepare", "--storage", str(storage)]) == 0
    assert {p.name: p.read_bytes() for p in (storage / "instance-images").iterdir()} == made
    for other in (["--photos", str(tmp_path / "typo")], [*given, "--set", "subject.crops=1"], [*given, "https://127.0.0.1:1/c.png"]):
        assert prepares(storage, *other) == 2, other
    (storage / "instance-images" / "00.png").write_bytes(b"damaged")
    assert prepares(storage, *given) == 2
    assert f"There is no photograph or folder {photos}" in capsys.readouterr().err


def test_a_command_that_fails_leaves_the_configuration(tmp_path: Path):
    """An unreachable default base, and then another one, whose own settings are not those of the first."""
    picture(tmp_path / "dog" / "a.png", 0)
    storage = tmp_path / "run"
    given = ["--photos", str(tmp_path / "dog"), "--class", "dog", "--storage", str(storage)]
    assert main(["prepare", *given]) == 2
    assert not (storage / "config.json").exists()
    assert main(["prepare", *given, "--base", "mini"]) == 0
    kept = (storage / "config.json").read_text()
    assert json.loads(kept)["prior"]["images"] == 64
    for spoilt in (["--class=cat", "--base=/no/such"], ["--class=cat", "--photos=/no/such"], ["--token=auto", "--photos", __file__]):
        assert main(["prepare", *given, *spoilt]) == 2
        assert (storage / "config.json").read_text() == kept
