"""The page in headless Chromium: from upload to picture, on the real API, with something in place of its models."""

import io
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in
import uvicorn
from images_api import Easel, app, colour_of
from PIL import Image
from test_runs import MINI, PHOTOS, SETTINGS, command

from raybooth.serving import uploads
from raybooth.serving.queue import Queue
from raybooth.serving.runs import RunManager, runs_router

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=30_000)  # for machines that do other things too
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Served:
    """An app on a port of loopback."""

    def __init__(self, root: Path, key: str | None = None):
        self.root, self.easel = root, Easel()
        made = app(root, self.easel, runs_router(RunManager(root, MINI, SETTINGS, Queue(command, grace=1))), [key] if key else [])
        self.server = uvicorn.Server(uvicorn.Config(made, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(tmp_path, getattr(request, "param", None))
    yield served
    served.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the page says on its console; a test that expects some clears it."""
    return []


@pytest.fixture
def page(browser: Browser, served: Served, complaints: list[str]) -> Iterator[Page]:
    """Open at `served`; anything the page complains of on its console fails the test."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(served.url)
        yield page
        # What the server refuses, Chromium notes by itself.
        assert not [c for c in complaints if not c.startswith("Failed to load resource: the server responded")]


def files(photos: list[bytes] = PHOTOS, name: str = "IMG") -> list[Any]:
    return [{"name": f"{name}_{i}.png", "mimeType": "image/png", "buffer": data} for i, data in enumerate(photos)]


def upload(page: Page, class_name: str = "dog", name: str | None = None, token: str | None = None) -> None:
    page.get_by_role("button", name="New subject").click()
    page.locator("#photos").set_input_files(files())
    expect(page.locator(".preview img")).to_have_count(5)
    page.get_by_label("It is a").fill(class_name)
    if name:
        page.get_by_label("Its name here").fill(name)
    if token:
        page.get_by_text("The word for it in prompts").click()
        page.get_by_label("A rare word").fill(token)
    page.get_by_role("button", name="Start", exact=True).click()


@pytest.fixture
def subject(page: Page, served: Served) -> None:
    """my-dog, learnt before."""
    storage = served.root / "my-dog"
    uploads.store(storage, uploads.settings(storage, MINI.base, {"class": "dog"}, SETTINGS), [uploads.Photo(f"{i}.png", p) for i, p in enumerate(PHOTOS)])
    stand_in.run(storage)
    page.reload()
    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()


def draw(page: Page, prompt: str | None = None, n: int = 1) -> None:
    if prompt is not None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Pictures", exact=True).fill(str(n))
    page.get_by_role("button", name="Draw").click()


def sideways(page: Page) -> int:
    return page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


def colour(page: Page, i: int) -> tuple[int, ...]:
    """Of the i-th picture on the page, as the browser has it."""
    return tuple(page.evaluate(
        """async (i) => {
          const image = document.querySelectorAll("#gallery figure img")[i];
          await image.decode();
          const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return [...context.getImageData(2, 2, 1, 1).data].slice(0, 3);
        }""", i))  # fmt: skip


def rgb(hexadecimal: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(hexadecimal[1:]))


def test_from_upload_to_picture(page: Page, served: Served):
    (served.root / "hold").touch()
    expect(page.get_by_text("Teach it something of yours")).to_be_visible()
    upload(page)
    run = page.locator(".run[data-id=my-dog]")
    expect(run.locator(".state")).to_have_text("running")
    expect(run.locator("[aria-current=step]")).to_contain_text("Learning10/40")
    expect(run.locator(".pictures img").first).to_have_js_property("naturalWidth", 16)
    (served.root / "hold").unlink()
    expect(run.locator("polyline")).to_be_attached()
    expect(run.locator(".state")).to_have_text("ready")
    expect(run).to_contain_text("step 100")

    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()
    expect(page.locator("#photographs img")).to_have_count(5)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("photo of unqtkn dog")
    page.get_by_role("button", name="in the snow").click()
    page.get_by_role("button", name="at night").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("photo of unqtkn dog at night")
    page.get_by_label("beside the base model").check()
    draw(page, n=2)
    shots = page.locator("#gallery figure button.frame img")
    expect(shots).to_have_count(4)
    asked = served.easel.rows
    assert [(r.subject.id, r.prompt) for r in asked] == [("my-dog", "photo of unqtkn dog at night"), ("base", "photo of dog at night")] * 2
    seed = asked[0].seed
    assert [r.seed for r in asked] == [seed, seed, seed + 1, seed + 1]
    assert [colour(page, i) for i in range(4)] == [rgb(colour_of(r)) for r in asked]
    expect(page.locator("#said")).to_have_text("4 of 4 pictures drawn.")

    page.reload()  # the gallery is kept, in its order
    expect(shots).to_have_count(4)
    assert [colour(page, i) for i in range(4)] == [rgb(colour_of(r)) for r in asked]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    with Image.open(io.BytesIO(download.value.path().read_bytes())) as image:
        assert image.getpixel((0, 0)) == rgb(colour_of(asked[0]))
    page.get_by_role("button", name=f"Delete, seed {seed}").click()
    expect(shots).to_have_count(3)
    page.reload()
    expect(shots).to_have_count(3)
    page.locator("article").get_by_role("button", name="Delete", exact=True).click()
    expect(shots).to_have_count(0)
    page.reload()
    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()
    expect(shots).to_have_count(0)


def test_pictures_arrive_step_by_step_and_can_be_cancelled(page: Page, served: Served):
    served.easel.slow = 0.4
    draw(page, "photo of a dog", n=2)
    tile = page.locator("#gallery figure").first
    expect(tile.locator("img.partial")).to_have_js_property("naturalWidth", 16)
    assert 0 < tile.locator("progress").evaluate("p => p.value") < 1
    page.get_by_role("button", name="Cancel").click()
    expect(tile).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    expect(page.locator("#trouble")).to_be_hidden()


def test_a_busy_server_is_waited_for(page: Page, served: Served):
    served.easel.busy = 1
    draw(page, "photo of a dog")
    expect(page.locator("#gallery figure")).to_contain_text("waiting: Nobody draws just now.")
    expect(page.locator("#gallery figure button.frame img")).to_have_count(1)


def test_what_goes_wrong_is_said(page: Page, served: Served, complaints: list[str]):
    draw(page, "photo of {subject}")
    expect(page.locator("#trouble")).to_contain_text("has no subject of its own")
    page.get_by_role("button", name="New subject").click()
    page.get_by_label("It is a").fill("dog")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#upload-trouble")).to_have_text("Choose some photographs first.")
    page.locator("#photos").set_input_files(files([b"no picture"]))
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#upload-trouble")).to_contain_text("IMG_0.png is not a picture that can be read")
    page.get_by_role("button", name="Remove IMG_0.png").click()
    page.get_by_role("button", name="Cancel").click()
    served.close()
    draw(page, "photo of a dog")
    expect(page.locator("#trouble")).to_have_text("The server does not answer. Is it still running?")
    complaints.clear()


def test_runs_stop_fail_and_go_on(page: Page, served: Served):
    (served.root / "hold").touch()
    upload(page)
    run = page.locator(".run[data-id=my-dog]")
    expect(run.locator("[aria-current=step]")).to_contain_text("Learning")
    upload(page, "failure")
    expect(page.locator(".run[data-id=my-failure] .state")).to_have_text("waits its turn")
    run.get_by_role("button", name="Stop").click()
    expect(run.locator(".state")).to_have_text("stopped")
    (served.root / "hold").unlink()
    expect(page.locator(".run[data-id=my-failure] .error")).to_have_text("The loss is not finite: lower finetune.lr.")
    run.get_by_role("button", name="Go on").click()
    expect(run.locator(".state")).to_have_text("ready")


@pytest.mark.parametrize("served", ["secret"], indirect=True)
def test_a_key_is_asked_for_when_the_server_wants_one(page: Page, served: Served):
    key = page.get_by_label("API key")
    for given in ("钥匙", "wrong"):  # of these no header can carry the first: it is not sent
        key.fill(given)
        page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text("That key is not accepted.")).to_be_visible()
    key.fill("secret")
    page.get_by_role("button", name="Go on").click()
    upload(page)
    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()
    expect(page.locator("#photographs img").first).to_have_js_property("naturalWidth", 64)
    draw(page)
    expect(page.locator("#gallery figure button.frame img")).to_have_count(1)
    expect(page.locator("#snippet")).to_contain_text("Bearer $RAYBOOTH_KEY")
    assert "secret" not in page.content()
    page.reload()
    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()
    expect(page.locator("dialog[open]")).to_have_count(0)


def test_names_and_prompts_are_only_text(page: Page, served: Served):
    evil = "<img src=x onerror=hacked=1>"
    upload(page, evil, "evil", "<script>hacked=1</script>")
    expect(page.get_by_role("radio", name="evil")).to_be_checked()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(f"photo of <script>hacked=1</script> {evil}")
    draw(page)
    expect(page.locator("#gallery h3")).to_have_text(f"photo of <script>hacked=1</script> {evil}")
    expect(page.locator("#gallery figure button.frame img")).to_have_count(1)
    page.reload()
    expect(page.locator("#gallery h3")).to_have_count(1)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img[src=x]").count() == 0


def test_scripts_that_are_not_the_servers_do_not_run(page: Page, complaints: list[str]):
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.inline = 1";
      addEventListener("securitypolicyviolation", (e) => (window.refused = e.effectiveDirective));
      document.body.append(script);
    }""")
    page.wait_for_function("window.refused")
    assert page.evaluate("window.inline") is None
    assert page.evaluate("window.refused") == "script-src-elem"
    complaints.clear()


@pytest.mark.usefixtures("subject")
def test_nothing_reaches_over_the_edge_of_a_phone(page: Page, served: Served):
    for name in ("grandmothers-old-coffee-mug", "x" * 64):
        shutil.copytree(served.root / "my-dog", served.root / name)
    page.reload()
    page.get_by_role("radio", name="my-dog").check(force=True)
    page.set_viewport_size({"width": 390, "height": 844})
    assert sideways(page) == 0
    page.get_by_label("beside the base model").press("Space")  # a click may meet a page that is still being laid out for its new width
    expect(page.get_by_label("beside the base model")).to_be_checked()
    draw(page, "photo of unqtkn dog " + "x" * 300, n=2)
    expect(page.locator("#gallery figure button.frame img")).to_have_count(4)
    page.get_by_text("As code").click()
    page.get_by_text("Earlier runs").click()
    for run in page.locator(".run summary").all():
        run.click()
    assert sideways(page) == 0
    page.locator("#gallery figure button.frame").first.click()
    assert sideways(page) == 0
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="New subject").click()
    page.locator("#photos").set_input_files(files())
    assert sideways(page) == 0
    box = page.locator("#upload").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


@pytest.mark.usefixtures("subject")
def test_the_request_as_code(page: Page):
    prompt = """photo of unqtkn dog, "the dog's" \\ $HOME `ls` dög"""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps").fill("7")
    page.get_by_text("As code").click()
    expect(page.locator("#snippet")).to_contain_text("dög")
    words = shlex.split(page.locator("#snippet").inner_text().replace("\\\n", " "))
    body = json.loads(words[words.index("-d") + 1])
    seed = int(page.get_by_label("Seed", exact=True).input_value())
    assert body == {"model": "my-dog", "prompt": prompt, "n": 4, "seed": seed, "steps": 7, "response_format": "b64_json"}

    page.get_by_label("Python").check()
    expect(page.locator("#snippet")).to_contain_text("OpenAI")
    # The client itself is the API's test; here its call is caught.
    client = "import json, sys, types\nclass OpenAI:\n def __init__(self, **k): self.images = self\n def generate(self, **k): print(json.dumps(k)); sys.exit()"
    fake = f"{client}\nsys.modules['openai'] = types.SimpleNamespace(OpenAI=OpenAI)\n"
    said = subprocess.run([sys.executable, "-c", fake + page.locator("#snippet").inner_text()], capture_output=True, text=True, check=True).stdout
    rest = {"model": "my-dog", "prompt": prompt, "n": 4, "response_format": "b64_json"}
    assert json.loads(said) == rest | {"extra_body": {"seed": seed, "steps": 7}}


@pytest.mark.usefixtures("subject")
def test_enter_while_it_draws_does_not_draw_again(page: Page, served: Served):
    served.easel.slow = 0.3
    for _ in range(4):
        page.get_by_label("Prompt", exact=True).press("Enter")
    shots = page.locator("#gallery figure button.frame img")
    expect(shots).to_have_count(4)
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    assert len(served.easel.rows) == 4
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(shots).to_have_count(8)


@pytest.mark.usefixtures("subject")
def test_a_picture_is_in_memory_once(page: Page):
    """As what the image shows, and not as the bytes that came too."""
    page.evaluate("""() => {
      const from = Uint8Array.from;
      window.came = [];
      Uint8Array.from = function (...how) {
        const made = from.apply(this, how);
        came.push(new WeakRef(made));
        return made;
      };
    }""")
    draw(page, n=3)
    expect(page.locator("#gallery figure button.frame img")).to_have_count(3)
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    assert page.evaluate("came.length") == 3
    page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
    assert page.evaluate("came.every((bytes) => !bytes.deref())")


@pytest.mark.usefixtures("subject")
def test_what_happens_elsewhere_is_seen(page: Page, served: Served):
    """Runs that others start, and subjects that go, a few seconds later; what one has before oneself stays."""
    page.clock.install()
    page.reload()
    page.get_by_label("Prompt", exact=True).fill("photo of unqtkn dog with a hat")
    fido, radio = served.root / "fido", page.get_by_role("radio", name="fido")

    def seconds_later() -> None:
        time.sleep(1.5)  # the server looks once a second
        page.clock.fast_forward(10_000)

    shutil.copytree(served.root / "my-dog", fido)
    seconds_later()
    expect(radio).to_be_visible()
    expect(page.locator(".run[data-id=fido]")).to_have_count(1)
    expect(page.get_by_role("radio", name="my-dog")).to_be_checked()
    shutil.rmtree(fido)
    seconds_later()
    expect(radio).to_have_count(0)
    expect(page.locator(".run[data-id=fido]")).to_have_count(0)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("photo of unqtkn dog with a hat")
    shutil.copytree(served.root / "my-dog", fido)
    seconds_later()
    expect(page.locator(".run[data-id=fido]")).to_have_count(1)


@pytest.mark.usefixtures("subject")
def test_by_keyboard_and_by_ear(page: Page, served: Served):
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(page.locator("#gallery figure button.frame img")).to_have_count(4)
    assert len(served.easel.rows) == 4
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, summary, a, progress, [role=group]")]
      .filter((e) => !(e.textContent.trim() || e.labels?.length || e.getAttribute("aria-label") || e.querySelector("img")?.alt)).map((e) => e.outerHTML)""")
    assert nameless == []
    assert page.evaluate("[...document.images].filter((i) => !i.hasAttribute('alt')).length") == 0
    page.get_by_role("radio", name="my-dog").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio", name="base model")).to_be_checked()
    expect(page.get_by_label("beside the base model")).to_be_hidden()
