"""The built site: strict, every public name on a page, and a search that finds it, in a browser where there is one.

Needs `pip install -e ".[docs]"`, and for the browser Chromium and its WebDriver on PATH
(Debian: `apt-get install chromium chromium-driver`); otherwise these tests are skipped. With
`--screenshots FOLDER` the browser's pictures are kept.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import flowsolve as fs

pytest.importorskip("mkdocs", reason="the site is built with the extra docs")
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = ("", "conventions/", "coming_from/artifex/", "benchmarks/work_precision/", "examples/digits/")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """The site, served."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def public_names() -> set[str]:
    """Every name that a public module of flowsolve exports, as flowsolve.module.name."""
    modules = [getattr(fs, name) for name in fs.__all__ if isinstance(getattr(fs, name), type(fs))]
    return {f"{module.__name__}.{name}" for module in modules for name in module.__all__}


def test_every_public_name_has_an_anchor(site):
    anchors = set()
    for page in (site / "api").rglob("index.html"):
        anchors |= set(re.findall(r'id="(flowsolve\.[\w.]+)"', page.read_text()))
    assert len(public_names()) > 200
    assert not public_names() - anchors


def test_search_index_has_the_solvers(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    places = {entry["location"] for entry in index["docs"] if "UniPC" in entry["title"]}
    assert "api/solvers/#flowsolve.solvers.UniPC" in places


def test_nothing_of_the_workshop_is_published(site):
    assert not list(site.rglob("*.py")) and not (site / "generate").exists()


class Browser:
    """Headless Chromium, driven over HTTP by its WebDriver."""

    def __init__(self, port: int, width: int, height: int):
        self.driver = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-prefers-reduced-motion",
        ]
        metrics = {"width": width, "height": height, "pixelRatio": 1}
        options = {"args": arguments, "binary": CHROMIUM, "mobileEmulation": {"deviceMetrics": metrics}}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = "/session/" + self.ask("POST", "/session", capabilities)["sessionId"]

    def ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.ask("POST", f"{self.session}/url", {"url": address})

    def run(self, script: str):
        """The value of JavaScript on the page."""
        return self.ask("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def element(self, selector: str) -> str:
        place = self.ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        (element,) = place.values()
        return f"{self.session}/element/{element}"

    def click(self, selector: str) -> None:
        self.ask("POST", f"{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.ask("POST", f"{self.element(selector)}/value", {"text": text})

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("GET", f"{self.session}/screenshot"))

    def close(self) -> None:
        self.ask("DELETE", self.session)


@pytest.fixture(scope="module")
def webdriver():
    """The port of a running WebDriver."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no Chromium with its WebDriver (chromedriver) on PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the WebDriver did not open its port within ten seconds")
    yield port
    process.terminate()
    process.wait()


@pytest.fixture(params=WIDTHS)
def browser(request, webdriver):
    """A browser as wide as a device."""
    opened = Browser(webdriver, *WIDTHS[request.param])
    yield opened, request.param
    opened.close()


def test_the_search_finds_unipc(address, browser):
    page, device = browser
    page.open(f"{address}/")
    page.click("input.md-search__input" if device == "desktop" else "label.md-header__button[for=__search]")
    page.type("input.md-search__input", "UniPC")
    links = "return [...document.querySelectorAll('a.md-search-result__link')].map(link => link.href)"
    for _ in range(100):
        found = [link for link in page.run(links) if "/api/solvers/" in link and "#flowsolve.solvers.UniPC" in link]
        if found:
            break
        time.sleep(0.2)
    assert found, "typing UniPC into the search finds no link to the page of solvers"
    page.open(found[0])
    assert page.run("return document.getElementById('flowsolve.solvers.UniPC').textContent").split()[0] == "UniPC"


def test_front_page_shows_its_picture_and_code(address, browser, request):
    page, device = browser
    page.open(f"{address}/")
    folder = request.config.getoption("--screenshots")
    if folder:
        Path(folder, f"front_{device}.png").write_bytes(page.screenshot())
    assert page.run("return document.querySelector('.front img').naturalWidth") > 0
    # The picture and the first line of code are seen without much scrolling.
    _, height = WIDTHS[device]
    for what, screens in ((".front img", 1), (".front pre", 2)):
        top = page.run(f"return document.querySelector('{what}').getBoundingClientRect().top")
        assert 0 < top < screens * height, what


def test_formulas_are_drawn_without_a_script_from_elsewhere(site, address, browser):
    for file in site.rglob("index.html"):
        text = file.read_text()
        assert not re.search(r'<script[^>]* src="(https?:)?//', text), file
        assert not re.search(r'class="arithmatex">\s*\\', text), file
    page, _ = browser
    page.open(f"{address}/api/paths/")
    assert page.run("return [...document.querySelectorAll('math')].every(m => m.getBoundingClientRect().height > 5)")
    assert page.run("return document.querySelectorAll('math').length") > 5


@pytest.mark.parametrize("place", PAGES)
def test_pages_do_not_run_over_the_edge(address, browser, place):
    page, _ = browser
    page.open(f"{address}/{place}")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
