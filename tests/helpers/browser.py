"""Chromium without a window: pages as people see them, and what their scripts say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)


def console_errors(said: str) -> list[str]:
    """Lines of the console of a page, without what the browser says of itself."""
    return re.findall(r'CONSOLE[^"]*"(.*)", source', said)


def run(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    profile = folder / f"profile{len(list(folder.glob('profile*')))}"
    return subprocess.run(
        [str(BROWSER), *_FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


def screenshot(
    page: Path, picture: Path, width: int, height: int, *, dark: bool = False
) -> list[str]:
    """Draw a page; what its console said."""
    flags = [f"--window-size={width},{height}", f"--screenshot={picture}"]
    flags += ["--virtual-time-budget=8000", *(["--force-dark-mode"] if dark else [])]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    return console_errors(run(page, picture.parent, *flags).stderr)


def evaluated(
    page: Path, folder: Path, expression: str, width: int = 1200
) -> tuple[Any, list[str]]:
    """What an expression gives in a page, and what its console said."""
    probe = folder / f"probe-{page.name}"
    script = (
        "<script>addEventListener('load', () => setTimeout(() => {"
        "let found; try { found = (" + expression + "); } catch (e) { found = 'error: ' + e; }"
        "const made = document.createElement('pre'); made.id = 'found';"
        "made.textContent = JSON.stringify(found); document.body.appendChild(made); }, 1500));</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"))
    flags = (f"--window-size={width},1000", "--virtual-time-budget=10000", "--dump-dom")
    done = run(probe, folder, *flags)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert match is not None, done.stdout[-2000:]
    import html

    return json.loads(html.unescape(match[1])), console_errors(done.stderr)
