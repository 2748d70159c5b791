"""The documentation: the site builds strictly and asks no other host for anything; what it says of settings and commands is so."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raybooth import config
from raybooth.cli import parser
from raybooth.config import MINI_DEFAULTS, Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTING = re.compile(rf"(?<![\w./-])((?:{'|'.join(Config.model_fields)})\.([a-z]\w*))")
FILES = {"py", "json", "html"}  # `lora.py` is no setting


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Page(HTMLParser):
    """What a page loads, and the text of each of its table rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data") or (tag == "link" and k == "href")]
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1] += data


def test_no_page_loads_anything_from_another_host(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for path in pages:
        assert not [u for u in Page(path).loads if re.match(r"(https?:)?//", u)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)['\"]?(https?:)?//", path.read_text()), path


def test_every_setting_is_listed_with_its_default_and_what_it_does(site: Path):
    rows = {row.split("\n")[1].rstrip("¶"): row for row in Page(site / "settings.html").rows if row.startswith("\n")}
    assert set(config.field_names()) <= rows.keys()
    for name in config.field_names():
        section, _, key = name.partition(".")
        model = Config.model_fields[section].annotation if key else Config
        field = next(f for k, f in model.model_fields.items() if (f.alias or k) == (key or section))  # type: ignore[union-attr]
        assert str(field.description) in rows[name]
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert json.dumps(field.default).replace("e-0", "e-") in rows[name]
    for section, values in MINI_DEFAULTS.items():
        for key in values:
            assert "mini: " in rows[f"{section}.{key}"]


def test_bounds_are_told():
    sys.path.insert(0, str(ROOT / "docs"))
    from generated import settings

    assert "| `prior.images`{ #prior.images } | integer, ≥ 0, ≤ 1000000 | `200`<br>mini: `64` | class pictures" in settings()
    assert "| `finetune.lr`{ #finetune.lr } | number, > 0 | `5e-6`<br>mini: `0.0002` | learning rate" in settings()
    assert '| `subject.class`{ #subject.class } | text, at most 100 characters | `""` | what it is' in settings()
    assert "integer, ≥ 1, ≤ 4096 or text, like <code>" in settings()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code in running text."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_that_are_named_exist(page: Path):
    text = page.read_text()
    code = [*spans(text), *(re.findall(r"--set (\S+)", "\n".join(fenced(text, "sh"))))]
    named = {name for span in code for name, key in SETTING.findall(span) if key not in FILES}
    assert named <= set(config.field_names())


def commands(text: str) -> Iterator[list[str]]:
    for block in fenced(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["raybooth"]:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_ones_that_raybooth_takes(page: Path):
    """Verbs in running text; in blocks whole lines, options and all."""
    text = page.read_text()
    verbs = {words[1] for span in spans(text) if len(words := span.split()) > 1 and words[0] == "raybooth" and not words[1].startswith("-")}
    choices = next(a.choices for a in parser()._actions if a.dest == "verb")
    assert verbs <= set(choices or ())
    for command in commands(text):
        args = parser().parse_args(command)
        config.load(None, getattr(args, "set", []), subject={"class": "dog"})
