"""A real Chromium for tests of the page.

Test files say `pytest_plugins = ["tests.browser"]`, take the fixture `open_page`, and import `served`; an
imported fixture would be made once for each file. PYTEST_DONT_REWRITE: the import comes before the plugin.

Chromium is one process for all tests. The first page of a test is opened in its own profile, which keeps the
page's scripts compiled and forgets what the page has stored; other pages have contexts of their own.
Playwright's driver is one process for the tests of a file that follow on each other. While it runs, the
thread counts as running an event loop, and whatever calls `asyncio.run` there fails: before another test it
is ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
import psutil
import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, Request, Response, sync_playwright

LOOPBACK = "127.0.0.1"
DEVICES = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}

OpenPage = Callable[..., Page]
"""`open_page(url, device="desktop", dark=False)`: see the fixture."""


@contextlib.contextmanager
def served(blocks: gr.Blocks, **launch: object) -> Iterator[str]:
    """Serve a page on a free port of the loopback; its address. `launch` goes to `Blocks.launch`."""
    try:
        _, url, _ = blocks.launch(server_name=LOOPBACK, prevent_thread_lock=True, quiet=True, **launch)
        yield url
    finally:
        blocks.close(verbose=False)


def find_chromium() -> str | None:
    """A Chromium of the system, else the one that `playwright install chromium` has fetched.

    The one without windows does the same work in less time.
    """
    for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


@pytest.fixture(scope="session", autouse=True)
def own_files(tmp_path_factory) -> None:
    """A page that ends removes its files, which may be those that the page of another worker shows."""
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[str]:
    """Address of the debugging port of a headless Chromium."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium: install your system's, or run `playwright install chromium`")
    profile = tmp_path_factory.mktemp("chromium")
    command = [
        executable,
        "--headless=new",
        "--no-sandbox",  # containers run as root, and only our own pages are opened
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--disable-features=SpareRendererForSitePerProcess",
        "--in-process-gpu",
        "--no-first-run",
        f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOOPBACK}",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{LOOPBACK}:{_debugging_port(process, profile)}"
    finally:
        # Debian's command may be a script that starts the browser: to end the script alone would leave that.
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        process.wait(30)


def _debugging_port(process: subprocess.Popen, profile: Path) -> int:
    """The port that Chromium has chosen; it writes it down when it is ready."""
    note = profile / "DevToolsActivePort"
    for _ in range(600):
        if note.is_file() and (lines := note.read_text().splitlines()):
            return int(lines[0])
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with code {process.returncode} before it was ready")
        time.sleep(0.1)
    raise RuntimeError("Chromium was not ready after a minute")


class Driver:
    """Playwright's driver, started when it is needed.

    Attributes:
        last: Whether the test that uses it is the last one before it is to end.
    """

    def __init__(self, chromium: str) -> None:
        self._chromium = chromium
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None
        self.last = True

    def browser(self) -> Browser:
        """Chromium, as the driver sees it."""
        if self._browser is None:
            self._playwright = sync_playwright().start()
            self._browser = self._playwright.chromium.connect_over_cdp(self._chromium)
        return self._browser

    def stop(self) -> None:
        if self._playwright is not None:
            self._playwright.stop()
        self._playwright = self._browser = None


DRIVER = pytest.StashKey[Driver]()


@pytest.fixture(scope="session")
def driver(chromium, pytestconfig) -> Iterator[Driver]:
    driver = pytestconfig.stash[DRIVER] = Driver(chromium)
    yield driver
    driver.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let the driver run on where the next test uses it too, with the fixtures of the same file."""
    if driver := item.config.stash.get(DRIVER, None):
        follows = nextitem is not None and nextitem.path == item.path
        driver.last = not follows or "open_page" not in getattr(nextitem, "fixturenames", ())


@pytest.fixture
def open_page(driver) -> Iterator[OpenPage]:
    """Opens `url` on a device of `DEVICES`, in the dark or not, and waits until gradio has drawn it.

    Only the loopback can be reached. After the test, an error in JavaScript or a failed request to the server
    fails it.
    """
    problems: list[str] = []
    with contextlib.ExitStack() as contexts:
        contexts.callback(lambda: driver.stop() if driver.last else None)
        browser = driver.browser()

        profile = browser.contexts[0]
        others = len(profile.pages)

        def open_page(url: str, device: str = "desktop", dark: bool = False) -> Page:
            scheme = "dark" if dark else "light"
            if len(profile.pages) == others:
                page = profile.new_page()
                contexts.callback(page.close)
                page.set_viewport_size(DEVICES[device]["viewport"])
                page.emulate_media(color_scheme=scheme)
                if device == "phone":
                    emulate_phone(page)
                forget(page, url)
            else:
                context = browser.new_context(**DEVICES[device], color_scheme=scheme)
                contexts.callback(context.close)
                page = context.new_page()
            watch(page, url, problems)
            page.goto(f"{url}{'&' if '?' in url else '?'}__theme={scheme}")
            page.locator(".gradio-container").first.wait_for()
            return page

        yield open_page
        watched = list(problems)  # closing a page aborts what it still asks for
    assert not watched, "\n".join(watched)


def emulate_phone(page: Page) -> None:
    """What a context for a phone does; a page in the profile can only be told by Chromium's own protocol."""
    phone = DEVICES["phone"]
    width, height = phone["viewport"]["width"], phone["viewport"]["height"]
    session = page.context.new_cdp_session(page)
    metrics = {
        "width": width,
        "height": height,
        "screenWidth": width,
        "screenHeight": height,
        "screenOrientation": {"angle": 0, "type": "portraitPrimary"},
        "deviceScaleFactor": phone["device_scale_factor"],
        "mobile": phone["is_mobile"],
    }
    session.send("Emulation.setDeviceMetricsOverride", metrics)
    session.send("Emulation.setTouchEmulationEnabled", {"enabled": phone["has_touch"]})


def forget(page: Page, url: str) -> None:
    """Let the page meet its visitor for the first time: what the server's site has stored is removed."""
    page.context.clear_cookies()
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    stored = {"origin": origin, "storageTypes": "cookies,indexeddb,local_storage,service_workers"}
    page.context.new_cdp_session(page).send("Storage.clearDataForOrigin", stored)


OF_EMPTIED_PLOTS = "Cannot read properties of null (reading 'offsetWidth')"


def watch(page: Page, url: str, problems: list[str]) -> None:
    """Note errors in JavaScript, and requests to the server of `url` that fail."""
    server = urlsplit(url).netloc

    def failed(request: Request) -> None:
        # A stream of events that the page ends by itself is no failure.
        if urlsplit(request.url).netloc == server and request.failure != "net::ERR_ABORTED":
            problems.append(f"{request.method} {request.url}: {request.failure}")

    def answered(response: Response) -> None:
        if urlsplit(response.url).netloc == server and response.status >= 400:
            problems.append(f"{response.request.method} {response.url}: {response.status}")

    def thrown(error: Error) -> None:
        # A plot of gradio's looks at its own size once more when it has just been emptied.
        if OF_EMPTIED_PLOTS in error.message and "/assets/Index-" in (error.stack or ""):
            return
        problems.append(f"JavaScript: {error}")

    page.on("pageerror", thrown)
    page.on("requestfailed", failed)
    page.on("response", answered)
