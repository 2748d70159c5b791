"""The report of a small run on mini: whole in one file, and in a browser, wide and narrow."""

import base64
import html
import importlib.metadata
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from PIL import Image, ImageOps
from stored import on_mini, teach

from raybooth import config, evaluation, plots, reporting
from raybooth.cli import parser
from raybooth.config import Config
from raybooth.drawing import by_prompt, draw
from raybooth.reporting import Line
from raybooth.score import Score
from raybooth.selection import rows_of
from raybooth.session import Run, settings_of
from raybooth.verbs import ALL, do

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, photos: Path, ray: None, fits_here: None) -> Path:
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


def facts_of(page: Path, scores: dict[str, Score]) -> dict[str, Any]:
    """What the page of the run would show, had it scored so."""
    with pytest.MonkeyPatch.context() as patch, Run(config.load(page.parent / "config.json", storage=str(page.parent)), quiet=True) as run:
        patch.setattr(evaluation, "read", lambda run: scores)
        return reporting.facts_of(run)


@pytest.fixture(scope="module")
def extreme(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, had it scored so that the marks lie at the ends of the bars, either way round, and without intervals; all its words are long."""
    scores = {
        "dino": Score(0.5, 0.45, 0.55, floor=0.9, ceiling=0.1, changed=(-0.5, -0.3)),
        "clip_i": Score(0.5, 0.45, 0.55, floor=0.1, ceiling=0.9),
        "clip_t": Score(0.9, 0.89, 0.91, floor=0.1, ceiling=None),
        "pres": Score(0.5, 0.1, 0.9, floor=0.5, ceiling=0.5),
        "div": Score(0.1, None, None, floor=None, ceiling=None),
    }
    long = "uninterruptedly" * 30
    facts = facts_of(page, scores)
    subject, (prompt, *drawn) = facts["subject"].model_copy(update={"token": long, "class_name": long}), facts["prompts"][0]
    facts |= {"subject": subject, "base": long, "class_prompt": long, "unscored": [long], "where": long, "versions": {long: long}}
    facts["prompts"] = [(f"{prompt} {long}", *drawn), *facts["prompts"][1:]]
    path = tmp_path_factory.mktemp("extreme") / "report.html"
    path.write_text(reporting.page(facts))
    return path


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
def test_it_opens_in_a_browser(extreme: Path, tmp_path: Path, width: int):
    """All pictures load, nothing is wider than the window or cut off, nothing is written to the console."""
    script = """<script>addEventListener('load', () => { const bad = [...document.images].filter(i => !i.naturalWidth).length;
      const marks = [...document.querySelectorAll('.bar *')].map(mark => mark.getBoundingClientRect());
      const cut = marks.filter(box => box.left < 0 || box.right > innerWidth).length, wide = document.documentElement.scrollWidth > innerWidth;
      parent.document.title = `pictures ${document.images.length} bad ${bad} marks ${marks.length} cut ${cut} wide ${wide}` })</script>"""
    inner = html.escape(extreme.read_text().replace("</body>", script + "</body>"))
    probe = tmp_path / "probe.html"  # in a frame: Chromium's own windows are not that narrow
    probe.write_text(f'<!doctype html><iframe width="{width}" height="900" style="border: 0" srcdoc="{inner}"></iframe>')
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,950",
         f"--user-data-dir={tmp_path / 'p'}",
         "--virtual-time-budget=4000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>pictures 19 bad 0 marks 17 cut 0 wide false</title>" in done.stdout, re.search("<title>.*?</title>", done.stdout)
    assert "CONSOLE" not in done.stderr


@pytest.fixture
def browser() -> Iterator["Browser"]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser: "Browser", path: Path, width: int = 1280, scheme: Literal["dark", "light"] = "light") -> "Page":
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    return page


def test_it_prints_the_bars_of_the_scores_and_the_configuration(extreme: Path, browser: "Browser"):
    """What browsers leave off paper if they are not told otherwise: backgrounds, and what is folded up. Paper is white, whatever the screen is."""
    page = opened(browser, extreme, scheme="dark")
    shown = "document.querySelector('details pre').checkVisibility({ contentVisibilityAuto: true })"
    assert not page.evaluate(shown)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('figure text')).fill") == "rgb(27, 27, 31)"
    page.wait_for_function(shown, timeout=5000)  # laid out in the frames that follow
    assert page.evaluate("[...document.querySelectorAll('.bar i')].every(bar => getComputedStyle(bar).printColorAdjust === 'exact')")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_only_what_is_wide_scrolls_and_letters_of_drawings_can_be_read(page: Path, browser: "Browser", width: int):
    shown = opened(browser, page, width)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    sizes = shown.evaluate(
        "[...document.querySelectorAll('figure text')].map(text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"
    )
    assert len(sizes) > 20
    assert 10 <= min(sizes) <= max(sizes) <= 16
    assert shown.evaluate("[...document.querySelectorAll('figure')].map(f => f.scrollWidth > f.clientWidth)") == [width < 560] * 2


def test_a_picture_is_enlarged_by_a_click_a_tap_or_a_key_one_at_a_time_and_never_on_paper(page: Path, browser: "Browser"):
    shown = opened(browser, page, 390)
    height, pictures = shown.evaluate("document.documentElement.scrollHeight"), shown.locator(".picture summary")
    small = pictures.nth(4).bounding_box()
    assert pictures.count() == shown.locator("img").count() > 10
    assert small
    assert small["width"] < 120
    pictures.nth(4).click()
    large = shown.locator(".picture[open] img").bounding_box()
    assert large
    assert large["width"] == pytest.approx(0.94 * 390, abs=2)
    assert large["height"] == large["width"] == pytest.approx(390 - 2 * large["x"], abs=1)
    assert shown.evaluate("document.documentElement.scrollHeight") == height, "nothing moves"
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.querySelector('.picture[open] summary')).position") == "static"
    shown.emulate_media(media="screen")
    shown.keyboard.press("Tab")
    shown.keyboard.press("Enter")
    assert [one.get_attribute("open") is not None for one in shown.locator(".picture").all()].index(True) == 5
    assert shown.locator(".picture[open]").count() == 1
    shown.keyboard.press("Enter")
    assert shown.locator(".picture[open]").count() == 0
    back = pictures.nth(4).bounding_box()
    assert back
    assert back["width"] == small["width"]


@pytest.mark.parametrize(("pictures", "side"), [(2, 600), (80, 512), (400, 160)])
def test_pictures_are_as_large_as_all_of_them_together_may_be(tmp_path: Path, pictures: int, side: int):
    """And none larger than it is."""
    with Image.open(sorted((Path(__file__).parent / "photographs").glob("*.*"))[0]) as photograph:
        ImageOps.fit(photograph.convert("RGB"), (600, 600)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    found = reporting.embedded([tmp_path / "small.png", *[tmp_path / "large.png"] * pictures])
    assert [size_of(found[tmp_path / name]) for name in ("small.png", "large.png")] == [min(64, side), side]
    assert pictures * len(found[tmp_path / "large.png"]) <= reporting.BUDGET


def size_of(uri: str) -> int:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.width


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_all_of_it_can_be_read_in_the_dark_and_by_day(page: Path, browser: "Browser", scheme: Literal["dark", "light"]):
    """Letters at 4.5 to 1 and more (WCAG 2.2, 1.4.3), lines and bars at 3 (1.4.11; the thin ones behind are paler); drawings lie on the page's own paper."""
    shown = opened(browser, page, scheme=scheme)
    colours = """(selector, property) => [...document.querySelectorAll(selector)].filter(e => e.matches('figure *, i') || [...e.childNodes].some(n =>
      n.nodeType === Node.TEXT_NODE && n.textContent.trim())).map(e => getComputedStyle(e)[property])"""

    def found(selector: str, by: str) -> set[tuple[int, ...]]:
        return {tuple(map(int, re.findall(r"\d+", c)[:3])) for c in shown.evaluate(f"([s, p]) => ({colours})(s, p)", [selector, by]) if c != "none"}

    (paper,) = {tuple(map(int, re.findall(r"\d+", shown.evaluate("getComputedStyle(document.body).backgroundColor"))))}
    assert sum(paper) > 700 if scheme == "light" else sum(paper) < 100
    letters = found("body :not(svg, svg *, style, script)", "color") | found("figure text", "fill")
    assert len(letters) >= 3
    assert min(contrast(one, paper) for one in letters) >= 4.5
    assert min(contrast(one, paper) for one in found(".bar i", "backgroundColor") | found("figure path, figure use", "stroke")) >= 3
    for figure in shown.locator("figure").all():
        with Image.open(io.BytesIO(figure.screenshot())) as drawn:
            assert max(drawn.convert("RGB").getcolors(1 << 24) or [])[1] == paper


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG's."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/run"


def reported(run: Run) -> str:
    with run:
        return reporting.report(run).read_text()


def test_what_the_checkpoints_drew_shows_on_another_machine_and_with_other_prompts(
    storage: str, photos: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    candidates = [
        {"step": 10, "dino": 0.5, "clip_t": 0.5, "balance": 1.93},
        {"step": 20, "dino": 0.5, "clip_t": 0.5, "own": 0.625, "base": 0.5, "balance": 1.8},
    ]
    with on_mini(storage, photos) as run:
        do(run, ["prepare", "class-images"])
        teach(run, 1, selected={"rule": "balance", "step": 10, "candidates": candidates})
        for step, model in ((0, "base-model"), (10, "fine-tuned-model"), (20, "fine-tuned-model")):
            draw(run, f"checkpoint-images/{step:07d}", model, run.config.generate, rows_of(run), {"seed": 0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    text = reported(on_mini(storage, photos, "generate.prompts=['photo of {subject} at night']"))
    assert [text.count(f'alt="photo of unqtkn dog in the snow, step {step}"') for step in (0, 10, 20)] == [1] * 3
    assert '<th colspan="3">photo of unqtkn dog in the snow</th>' in text
    assert "subject 0.500 prompt 0.500 balance 1.930 subject 0.500 (80%) prompt 0.500 (100%) balance 1.800" in told(text)
    assert re.search(r"1 of 2 pictures of each prompt. The one of step 10 is the model, by \W*balance\W. The highest balance is taken", told(text))
    assert text.count('alt="photo of unqtkn dog at night, after') == 2
    for stage in ("encoders", "class-images", "checkpoint-images/0000010", "scores"):
        assert f"<td>{stage}</td>" in text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    shutil.rmtree(tmp_path / "two")
    gone = on_mini(storage, photos)
    gone.workspace.remove("checkpoint-images")
    assert "As it learnt" not in reported(gone)


def test_a_lora_of_others_was_not_trained_here_and_class_images_of_other_settings_are_not_its_own(storage: str, photos: Path, in_process: None):
    with on_mini(storage, photos) as run:
        do(run, ["prepare", "class-images"])
        teach(run, 1, imported="theirs.safetensors")
    text = reported(on_mini(storage, photos, "prior.guidance=3"))
    assert "of the LoRA theirs.safetensors, made elsewhere" in text
    assert commanded(text) == (["import", "theirs.safetensors", "settings.json", "--storage", "ANOTHER-FOLDER"], "import")
    assert "Fine-tuned by" not in text
    assert "Losses" not in text
    assert "<td>class-before-images</td>" in text
    assert "<td>class-images</td>" not in text


def commanded(text: str) -> tuple[list[str], str]:
    """The command that makes a run again, and the verb as which raybooth takes it."""
    found = re.search(r"<pre>raybooth (.*?)</pre>", text)
    assert found
    words = shlex.split(html.unescape(found[1]))
    return words, parser().parse_args(words).verb


def test_to_make_it_again_is_by_what_made_the_model_and_drew_the_pictures(storage: str, photos: Path, tmp_path: Path, in_process: None):
    """And not by what the storage's config.json says, or this machine has."""
    with on_mini(storage, photos) as run:
        do(run, ["prepare", "class-images"])
        made = on_mini(storage, photos, "finetune.steps=800", "evaluate.select=subject", "generate.guidance=5").config
        teach(run, 1, configuration=settings_of(made), versions={"torch": "1.2.3"})
    later = on_mini(storage, photos, "generate.guidance=1.5")
    text = reported(later)
    link = re.search(r'href="data:application/json;base64,([^"]+)" download="settings.json"', text)
    assert link
    (tmp_path / "settings.json").write_bytes(base64.b64decode(link[1]))
    again = config.load(tmp_path / "settings.json")
    assert again == made.model_copy(update={"generate": later.config.generate})
    assert commanded(text) == (["run", "settings.json", "--storage", "ANOTHER-FOLDER"], "run")
    assert "&#34;steps&#34;: 800" in text[text.index("The whole configuration") :]
    assert "<td>torch</td><td>1.2.3</td>" in text
    assert str(later.workspace.root) not in text


def test_a_model_keeps_its_configuration_and_the_versions_that_made_it(page: Path):
    told = json.loads((page.parent / "fine-tuned-model" / "manifest.json").read_text())["facts"]
    assert told["configuration"]["finetune"]["steps"] == 4
    assert told["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize("steps", [[10], [*range(10, 120, 10)], [*range(10, 410, 10)]])
def test_of_many_checkpoints_those_are_shown_that_tell_most(steps: list[int]):
    for taken in steps:
        shown = reporting.columns(steps, taken)
        assert shown == sorted(set(shown))
        assert len(shown) == min(len(steps), 11)
        assert {steps[0], steps[-1], taken} <= set(shown) <= set(steps)


def test_ever_so_many_large_pictures_still_make_a_page_that_can_be_sent(
    tmp_path: Path, photos: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A thousand photographs, 120 long prompts, 40 checkpoints."""
    with on_mini(tmp_path, photos) as run:
        do(run, ["prepare", "class-images"])
        steps = [*range(10, 410, 10)]
        teach(run, 1, selected={"rule": "subject", "step": 390, "candidates": [{"step": s, "dino": 0.5, "clip_t": 0.5} for s in steps]})
        do(run, ["report"])
        draw(run, "checkpoint-images/0000000", "base-model", run.config.generate, rows_of(run), {"seed": 0})
        for step in steps:
            shutil.copytree(tmp_path / "checkpoint-images" / "0000000", tmp_path / "checkpoint-images" / f"{step:07d}")
        found, shown = evaluation.pictures(run), run.facts("output-images")["pictures"]
        with Image.open(sorted((Path(__file__).parent / "photographs").glob("*.*"))[0]) as photograph:
            large = ImageOps.fit(photograph.convert("RGB"), (192, 192))
        for folder, name in (("output-images", shown[0]), ("before-images", shown[0]), ("instance-images", "00.png")):
            large.save(tmp_path / folder / name)
        prompts = [f"prompt {i} {'of many words ' * 60}" for i in range(120)]
        monkeypatch.setattr(evaluation, "pictures", lambda run: found | {"instance": ("instance-images", ["00.png"] * 1000)})
        of_stage = {"output-images": dict.fromkeys(prompts, shown[:1] * 4)}
        monkeypatch.setattr(reporting, "by_prompt", lambda run, stage: of_stage.get(stage) or by_prompt(run, stage))
        monkeypatch.setattr(Config, "output_prompts", prompts)
        text = reporting.page(reporting.facts_of(run))
    assert text.count("data:image/jpeg") == 24 + 100 * 8 + 2 * 2 + 12
    assert 2_000_000 < len(text) < 5_000_000
    assert "The first 100 of 120 prompts" in text
    assert "learnt from 1000 photographs" in text
    assert "... and 976 more" in text
    assert "11 of the 40 kept checkpoints" in text
    assert '<th class="taken">step 390</th>' in text
    assert "The one whose pictures are likest to the subject is taken." in text
    assert "balance" not in told(text[text.index("As it learnt") : text.index("What took how long")])
    next((tmp_path / "checkpoint-images" / "0000010").glob("*-000.png")).write_text("no picture")
    run.quiet = False
    assert reporting._strip(run, run.facts("fine-tuned-model")["selected"]) is None
    assert "pictures of checkpoint-images/0000010 are missing or damaged" in capsys.readouterr().err


def test_what_the_page_leaves_out_it_says(storage: str, photos: Path, in_process: None):
    sets = ["generate.images_per_prompt=5", "prior.images=9"]
    with on_mini(storage, photos, *sets) as run:
        do(run, ["prepare", "class-images"])
        teach(run, 1)
    text = reported(on_mini(storage, photos, *sets))
    assert text.count("data:image/jpeg") == 3 + 2 * 4 + 2 * 8
    for cut in ("before: 4 of 5 pictures", "after: 4 of 5 pictures", "before: 8 of 9 pictures", "after: 8 of 9 pictures"):
        assert text.count(f"<p>{cut}</p>") == 1
    assert "All pictures are in class-images/ and class-after-images/." in text


def test_drawings_have_names_and_no_line_for_what_there_was_not():
    history = [{"step": step, "instance": 0.5, "prior": 0.0, "validation_instance": 0.5} for step in (10, 20)]
    drawn = plots.losses(history)
    assert plots.COLOURS["prior"] not in drawn
    assert plots.COLOURS["prior"] in plots.losses([row | {"prior": 0.1} for row in history])
    assert drawn.startswith('<svg role="img" aria-label="The losses over the steps" ')
    assert 'aria-label="Time of each stage: finetune 1.0 min, generate 5 s"' in plots.bars({"finetune": 61.2, "generate": 5.0})


def test_times_are_in_what_people_count_them_in():
    assert [plots.duration(seconds) for seconds in (0, 45.4, 210, 4300)] == ["0 s", "45 s", "3.5 min", "1.2 h"]
    for seconds, words in ((45, ["45 s", "seconds"]), (210, ["3.5 min", "minutes"]), (4300, ["1.2 h", "hours"])):
        assert all(f">{text}</text>" in plots.bars({"finetune": seconds}) for text in words)


def test_a_score_stands_in_the_page_with_its_interval_and_what_has_changed(page: Path):
    """As text, with a minus that screen readers read; in words, what the interval of a change means."""
    scores = {
        "dino": Score(0.9197, 0.9056, 0.9311, floor=0.541, ceiling=0.9216, changed=(0.3651, 0.3926)),
        "clip_t": Score(0.6, None, None, floor=0.55, ceiling=None, changed=None),
        "pres": Score(-0.06, -0.162, 0.0533, floor=-0.0597, ceiling=0.92, changed=(-0.042, 0.041)),
    }
    text = told(reporting.page(facts_of(page, scores)))
    assert "0.920 (0.906 to 0.931), +0.379 since the base model (+0.365 to +0.393)" in text
    assert "\u22120.060 (\u22120.162 to 0.053), +0.000 since the base model (\u22120.042 to +0.041)" in text
    assert "0.600 base 0.550" in text
    assert "it does not hold nought, and the change is real" in text
    assert "photographs the same among the photographs themselves" in text
    assert not re.search(r"(?<![\w.-])-\d", text[text.index("Scores") : text.index("Before and after")])


def test_of_one_photograph_no_mark_is_explained_that_is_not_there(page: Path):
    text = told(reporting.page(facts_of(page, {"dino": Score(0.9, 0.8, 1.0, floor=0.5, ceiling=None), "clip_t": Score(0.6, 0.5, 0.7, floor=0.5, ceiling=0.6)})))
    assert "base is the same before fine-tuning." in text
    assert "base, without the token 0.600" in text
    assert "photographs the same" not in text
    assert "hold nought" not in text, "nothing has an interval of change"


def test_every_score_says_which_way_is_better():
    assert all(re.search(r"(Higher|Lower|nearer .*) is better|the better", meaning) for _, meaning in reporting.WORDS.values())
    assert "Lower is better" in reporting.WORDS["pres"][1]


def told(page: str) -> str:
    """The page's words."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page.partition("<body>")[2])).split()).replace(" ,", ",").replace(" .", ".")


def test_what_hardly_differs_looks_so():
    """Nought is on every bar: 0.82 beside 0.85 is not at its other end."""
    line = Line("?", "", Score(0.823, 0.787, 0.860, floor=0.852, ceiling=None))
    assert 0 <= line.place(0) < 10
    assert 0 < line.place(0.852) - line.place(0.823) < 5
