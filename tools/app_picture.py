"""Draw `assets/app.png`, the picture of the page in the README, anew: the demo's page as it opens.

    python tools/app_picture.py

It wants playwright and a Chromium, as the tests of the page do. What is shown are the adapters that come with
the project, whatever `make demo` has left.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PROJECT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 800


def main() -> None:
    """Start the page, open it in a browser, and write what is in sight."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=PROJECT / "assets" / "app.png")
    output = parser.parse_args().output
    command = [sys.executable, "-m", "flatlora_diffusion.app", "--run", "assets/adapters"]
    with tempfile.TemporaryDirectory() as folder:
        votes = ["--votes", str(Path(folder, "votes.jsonl"))]
        app = subprocess.Popen([*command, *votes], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        try:
            photograph(address(app), Path(folder, "page.png"))
        finally:
            app.terminate()
            app.wait()
        with Image.open(Path(folder, "page.png")) as picture:
            picture.convert("RGB").save(output, optimize=True)


def address(app: subprocess.Popen[str]) -> str:
    """Where the page is, as soon as it is up."""
    assert app.stdout is not None
    for line in app.stdout:
        if found := re.match(r"the page is at (\S+)", line):
            return found[1]
    raise SystemExit("the page did not start: what is above says why")


def photograph(url: str, file: Path) -> None:
    """What a visitor sees who opens the page on a desktop."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"{url}?__theme=light")
        page.locator(".stage:not(.empty)").wait_for(timeout=120_000)
        page.locator(".stage-prompt:not(:empty)").wait_for()
        page.locator(".stage img").nth(1).evaluate("picture => picture.decode()")
        page.wait_for_timeout(1000)  # until nothing fades in any more
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main()
