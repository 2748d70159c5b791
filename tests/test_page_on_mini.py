"""The page as people start it: `raybooth serve` on mini, photographs up, a run, a picture of its subject down."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from test_serve import serving

pytest.importorskip("playwright")
from playwright.sync_api import expect, sync_playwright
from test_page import CHROMIUM, files

SETS = ("finetune.steps=4", "prior.images=2", "prior.steps=2", "generate.steps=2", "generate.images_per_prompt=1", "generate.prompts=['photo of {subject}']")
MINUTES = 60_000
SHOTS = os.environ.get("RAYBOOTH_SCREENSHOTS")
"""A folder that keeps what the page looked like."""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_from_upload_to_picture(tmp_path: Path):
    shots = Path(SHOTS or tmp_path)
    kennel = tmp_path / "kennel"
    kennel.mkdir()
    complaints: list[str] = []
    sets = [word for one in SETS for word in ("--set", one)]
    with serving(str(kennel), "--base", "mini", "--replicas", "1", *sets) as (url, _), sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(2 * MINUTES)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(url)
        page.get_by_role("button", name="New subject").click()
        page.locator("#photos").set_input_files(files())
        page.get_by_label("It is a").fill("dog")
        page.screenshot(path=shots / "upload.png")
        page.get_by_role("button", name="Start", exact=True).click()
        run = page.locator(".run[data-id=my-dog]")
        expect(run.locator("[aria-current=step]")).to_be_visible(timeout=2 * MINUTES)
        page.screenshot(path=shots / "running.png")
        expect(run.locator(".state")).to_have_text("ready", timeout=5 * MINUTES)
        expect(page.get_by_role("radio", name="my-dog")).to_be_checked(timeout=MINUTES)
        page.get_by_label("Pictures", exact=True).fill("2")
        page.get_by_label("Steps").fill("3")
        page.get_by_label("beside the base model").check()
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#gallery figure button.frame img")).to_have_count(4, timeout=2 * MINUTES)
        expect(page.get_by_role("button", name="Draw")).to_be_enabled()
        page.screenshot(path=shots / "1280.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 844})
        page.screenshot(path=shots / "390.png", full_page=True)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").first.click()
        with Image.open(io.BytesIO(download.value.path().read_bytes())) as image:
            assert image.size == (64, 64)
            assert image.info["prompt"] == "photo of unqtkn dog"
            assert image.convert("L").getextrema() != (0, 0)
    assert not complaints
