"""The report of a small run on mini: whole in one file, and in a browser, wide and narrow."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raybooth import config
from raybooth.reporting import ALL
from raybooth.session import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, photos: Path, ray: None) -> Path:
    storage = tmp_path_factory.mktemp("report")
    made = config.load(
        None,
        ["prior.images=4", "prior.steps=4", "finetune.steps=4", "finetune.log_every=1", "generate.steps=4", "generate.images_per_prompt=2",
         "generate.prompts=['photo of {subject} in the snow', 'photo of {subject} <b>&']"],
        subject={"photos": [str(photos)], "class": "dog"}, base={"model": "mini"}, storage=str(storage),
    )  # fmt: skip
    with Run(made) as run:
        for name in ("prepare", "class-images", "encode", "finetune", "generate", "report"):
            ALL[name](run)
    return storage / "report.html"


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]


def test_it_is_one_file_that_asks_nobody_for_anything(page: Path):
    text = page.read_text()
    parser = Sources()
    parser.feed(text)
    assert len(text) < 5_000_000
    assert all(s.startswith(("data:", "#")) for s in parser.found), [s[:60] for s in parser.found if not s.startswith(("data:", "#"))]
    assert not re.search(r"url\((?!['\"]?(?:data:|#))|@import", text)
    assert text.count("data:image/jpeg") == 3 + 2 * 2 * 2 + 2 * 4


def test_it_tells_what_was_measured_and_lets_no_prompt_write_html(page: Path):
    text = page.read_text()
    assert "&lt;b&gt;&amp;" in text
    assert "dog &lt;b&gt;" in text
    assert "<b>&" not in text
    for question in ("Is it the subject?", "any dog?", "What took how long"):
        assert question in text.replace("&#39;", "'")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_a_browser(page: Path, tmp_path: Path, width: int):
    """All pictures load, nothing is wider than the window, nothing is written to the console."""
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener('load', () => { const bad = [...document.images].filter(i => !i.naturalWidth).length;
      document.title = 'pictures ' + document.images.length + ' bad ' + bad + ' wide ' + (document.documentElement.scrollWidth > innerWidth) })</script>"""
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'p'}",
         "--virtual-time-budget=4000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>pictures 19 bad 0 wide false</title>" in done.stdout, re.search("<title>.*?</title>", done.stdout)
    assert "CONSOLE" not in done.stderr
