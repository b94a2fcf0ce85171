"""Starts a spider in a process of its own and returns what it found."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from pipelines.errors import SourceError
from pipelines.fingerprint import ROOT

logger = logging.getLogger(__name__)

PROGRAM = "pipelines.spiders.crawl"
GRACE_SECONDS = 15
LAST_LINES = 5
ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY",
    "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip


def run_spider(
    name: str,
    request: dict[str, Any],
    folder: Path,
    *,
    secrets: tuple[str, ...] = (),
    program: str = PROGRAM,
) -> dict[str, Any]:
    """Run a spider to its end; return what it returned.

    `request` holds JSON values (see the package). `secrets` names the environment variables that
    are handed on besides a fixed list. Raises SourceError with the spider's own sentence, or its
    last lines where it crashed. The spider ends with this process, however that ends.
    """
    with tempfile.TemporaryDirectory(prefix="starloom-") as scratch:
        result = Path(scratch, "result.json")
        asked = {
            "spider": name,
            "folder": str(folder.absolute()),
            "result": str(result),
            "request": request,
        }
        hide = hide_secrets(secrets)
        lines = _run(asked, secrets, program, hide)
        outcome = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "error" in outcome:
        raise SourceError(hide(outcome["error"]))
    if "done" not in outcome:
        raise SourceError(f"spider {name!r} crashed: {' | '.join(lines) or 'no output'}")
    done: dict[str, Any] = outcome["done"]
    return done


def hide_secrets(names: tuple[str, ...]) -> Callable[[str], str]:
    """Return a function that blanks the values of environment variables in a text."""
    values = [value for name in names if (value := os.environ.get(name))]
    forms = {form for value in values for form in (value, quote(value), quote_plus(value))}

    def hide(text: str) -> str:
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
        return text

    return hide


def _run(
    asked: dict[str, Any], secrets: tuple[str, ...], program: str, hide: Callable[[str], str]
) -> list[str]:
    """Run the process to its end, passing on its progress; return its last lines."""
    names = {*ENVIRONMENT, *secrets}
    process = subprocess.Popen(
        [sys.executable, "-m", program],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key in names},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        # The pipe stays open: the spider stops when it closes.
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            text = hide(line.strip())
            if text.startswith("progress "):
                logger.info("fetch      %s", text.removeprefix("progress "))
            elif text:
                last.append(text)
        process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        process.stdin.close()
        process.stdout.close()
    return list(last)
