# SPDX-License-Identifier: Apache-2.0
"""A real headless browser, for pages that we write."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces.errors import ClusterError
from tests.slurm.cluster.packages import install, why_not_installable

# of those that print a page as their scripts have left it (--dump-dom)
PROGRAMS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
PACKAGE = "chromium"
# where a browser must be there, as Slurm must
REQUIRES = ("CI", "DYN_MPI_REQUIRE_SLURM")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # what the browser would report to its maker stays here
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr",
)
_SECONDS = 60.0
_RESULT = re.compile(r'<output id="result" hidden="">(.*?)</output>', re.DOTALL)


@dataclass(frozen=True)
class Loaded:
    """Pages in the browser.

    Args:
        results: what the test's script has returned of each; empty without one.
        console: what the browser has said of them: errors, refusals, warnings.
        fetched: addresses that the pages have asked for.
    """

    results: list[Any]
    console: list[str]
    fetched: list[str]


@dataclass(frozen=True)
class Browser:
    """Where it is.

    Args:
        program: Chromium, or what is made of it.
    """

    program: str

    def load(self, *pages: str, script: str = "", dark: bool = False) -> Loaded:
        """Load pages, all in one run of the browser, which takes a second to start.

        Args:
            pages: HTML.
            script: the body of a function, which is called in each page once it has loaded; the pages' policy against scripts is taken away
                for it.
            dark: whether the user prefers dark pages.
        """
        if script:
            pages = tuple(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page) for page in pages)
        with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as name:
            words = [
                *(self.program, *_FLAGS, f"--user-data-dir={name}/profile", f"--log-net-log={name}/net.json"),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *("--window-size=1300,900", "--dump-dom"),
            ]
            with _served([_frames(len(pages), script), *pages]) as address:
                done = subprocess.run(
                    [*words, address],
                    capture_output=True,
                    text=True,
                    timeout=_SECONDS,
                    env={**os.environ, "HOME": name},
                    check=True,
                )
            own = {address, f"{address}favicon.ico", *(f"{address}{number}" for number in range(1, len(pages) + 1))}
            fetched = _fetched(Path(name) / "net.json") - own
        found = _RESULT.search(done.stdout)
        results = json.loads(_unescape(found[1])) if found else []
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Loaded(results, console, sorted(fetched))


def _frames(number: int, script: str) -> str:
    """Return a page around the pages, which calls the script in each."""
    frames = "".join(f'<iframe src="/{at + 1}" width="1280" height="800"></iframe>' for at in range(number))
    call = (
        f"const script={json.dumps(script)};"
        "onload=()=>{const found=Array.from(document.querySelectorAll('iframe'),frame=>new frame.contentWindow.Function(script)());"
        "const out=document.createElement('output');out.id='result';out.hidden=true;out.textContent=JSON.stringify(found);"
        "document.body.append(out)}"
    )
    # frames prefer what the page around them is drawn in
    scheme = '<!DOCTYPE html><html style="color-scheme:light dark">'
    return f"{scheme}<body>{frames}{f'<script>{call}</script>' if script else ''}</body></html>"


def find_browser() -> Browser:
    """Return the browser on PATH; where one is required and this is Debian, install it. Skips the test where there is none."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None and any(os.environ.get(name) in ("1", "true") for name in REQUIRES):
        reason = why_not_installable() or ("not root" if os.geteuid() else "")
        assert not reason, f"no browser ({', '.join(PROGRAMS)}), and it can't be installed: {reason}"
        try:
            install([PACKAGE])
        except ClusterError as error:
            pytest.fail(str(error))
        found = shutil.which(PACKAGE)
        assert found, f"Debian's package {PACKAGE} has brought no program of that name"
    if found is None:
        pytest.skip(f"no browser on PATH: {', '.join(PROGRAMS)}")
    return Browser(found)


@contextmanager
def _served(pages: Sequence[str]) -> Iterator[str]:
    """Serve the pages by their numbers, the first as /, and nothing else, on loopback; yield the address."""
    bodies = {f"/{number or ''}": page.encode() for number, page in enumerate(pages)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.get(self.path, b"")
            # a browser asks for an icon by itself
            self.send_response(200 if body else 204 if self.path == "/favicon.ico" else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def _fetched(log: Path) -> set[str]:
    """Return what pages have asked for, by the browser's own log of its network; the browser's own requests are of no page."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params", {}) for event in events]
    return {params["url"] for params in asked if "url" in params and params.get("initiator", "").startswith("http")}


def _unescape(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0").replace("&amp;", "&")
