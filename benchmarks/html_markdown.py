"""HTML to Markdown on every body of the real dumps, against three libraries.

    python -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install -r benchmarks/peers.txt
    STARLOOM_REAL_DATA=... python -m benchmarks.html_markdown [--rounds 15]

Rounds of ours and of the fast peer alternate in one process; the slow peers take a round each.
What is compared afterwards is what a reader sees: the Markdown of each library is rendered, and
its words, code blocks, code spans and structure are set against those that lxml reads in the HTML.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
from lxml import etree

from pipelines.sources.html_markdown import html_to_markdown
from tests.assets.html_pages import read_page, render

DUMPS = ("se_cardano_2021", "se_conlang_meta_2020")
Convert = Callable[[str], str]
# Class of difference -> what happened; the first group is found on the rendered page.
EXPLAINED = {
    "words: a tag-like text": "`<your name>` left unescaped: a renderer drops it as HTML",
    "words: the start of a line": "`- `, `1) ` or `> ` left unescaped: it became a list or quote",
    "words: other": "a line break lost, so that two words are one; marks shown as text",
    "code blocks: blanks at the end": "blank lines or blanks at the end of a `pre` are cut",
    "code blocks: other": "a `pre` is missing, joined or changed within",
    "code spans": "inline code is missing or changed",
    "structure": "empty quotes and items dropped; emphasis, links or images that do not pair",
    "only spelling": "the same page, spelled in another way",
    "identical": "the same characters as starloom",
}
# Within "only spelling": a body counts where the two texts differ in how many of these they hold.
SPELLINGS = {
    "bullets": (r"(?m)^[ >]*[*+] ", "`*` for `-`"),
    "underlined headings": (r"(?m)^[ >]*(?:={3,}|-{3,})$", "a line of `=` or `-` for `#`"),
    "escapes": (r"\\[^\w\s]", "`snake\\_case`, or marks left unescaped that pair with nothing"),
    "autolinks": (r"<https?:", "`[address](address)` for `<address>`"),
    "hard breaks": (r"(?:  |\\)\n", "two for one, or none where nothing follows"),
    "runs of blanks": (r"\S {2,}\S", "two blanks between sentences; starloom keeps the author's"),
    "titles of links": (r'\]\([^)\s]+ "', "dropped or escaped"),
    "fences": (r"(?m)^[ >]*(?:```|~~~)", "code indented by four blanks"),
    "line ends": (r"\n", "line breaks inside a paragraph joined; other blank lines"),
}


def read_bodies(data: Path) -> list[str]:
    """Return every body of both dumps."""
    rows = (row for dump in DUMPS for _, row in etree.iterparse(data / dump / "Posts.xml"))
    return [row.get("Body") or "" for row in rows if row.tag == "row"]


def load_peers() -> dict[str, Convert]:
    """Return the libraries of benchmarks/.venv, each as its README says to call it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sys.path.append(str(Path(__file__).parent / ".venv" / "lib" / version / "site-packages"))
    import html2text  # type: ignore[import-not-found]
    import html_to_markdown as rust  # type: ignore[import-not-found]
    import markdownify  # type: ignore[import-not-found]

    def by_html2text(body: str) -> str:
        parser = html2text.HTML2Text(bodywidth=0)
        parser.mark_code = False
        return str(parser.handle(body))

    return {
        "html-to-markdown": lambda body: rust.convert(body).content,
        "html2text": by_html2text,
        "markdownify": markdownify.markdownify,
    }


def measure(converters: dict[str, Convert], bodies: list[str], rounds: int) -> dict[str, float]:
    """Return CPU seconds for all bodies: the median of each converter's rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in converters}
    for number in range(rounds):
        for name, convert in converters.items():
            if number and name in ("html2text", "markdownify"):
                continue
            started = time.process_time()
            for body in bodies:
                convert(body)
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def find_classes(body: str, markdown: str, ours: str) -> list[str]:
    """Return the classes of differences between a library's page and the HTML's, or ours."""
    html, page = read_page(body), read_page(render(markdown))
    found = []
    if html.words != page.words:
        lost = Counter(html.words) - Counter(page.words)
        new = page.tags - html.tags
        kind = "other"
        if any(word[0] == "<" for word in lost):
            kind = "a tag-like text"
        elif any(new[tag] for tag in ("ul", "ol", "li", "blockquote")):
            kind = "the start of a line"
        found.append(f"words: {kind}")
    if html.blocks != page.blocks:
        same = [b.rstrip() for b in html.blocks] == [b.rstrip() for b in page.blocks]
        found.append(f"code blocks: {'blanks at the end' if same else 'other'}")
    if html.spans != page.spans:
        found.append("code spans")
    if html.tags != page.tags:
        found.append("structure")
    if found:
        return found
    if markdown.strip() == ours.strip():
        return ["identical"]
    spelled = [
        f"- {name}"
        for name, (pattern, _) in SPELLINGS.items()
        if len(re.findall(pattern, markdown.strip())) != len(re.findall(pattern, ours))
    ]
    return ["only spelling", *(spelled or ["- other"])]


def compare(converters: dict[str, Convert], bodies: list[str]) -> dict[str, Counter[str]]:
    """Count, for each library, the bodies in each class of differences."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in converters}
    for body in bodies:
        ours = html_to_markdown(body)
        for name, convert in converters.items():
            counts[name].update(find_classes(body, convert(body), ours))
    return counts


def report(
    bodies: list[str], seconds: dict[str, float], counts: dict[str, Counter[str]], rounds: int
) -> str:
    """Return both tables as Markdown."""
    size = sum(len(body.encode()) for body in bodies) / 1e6
    machine = f"{psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    names = ("html-to-markdown", "html2text", "markdownify", "lxml", "markdown-it-py")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    ours = seconds["starloom"]
    lines = [
        (
            f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {machine}, "
            f"Python {platform.python_version()}, {versions}"
        ),
        "",
        (
            f"{len(bodies):,} bodies of two real dumps, {size:.2f} MB; median of {rounds} "
            "alternating rounds (markdownify and html2text: one)."
        ),
        "",
        "| | CPU s | bodies per CPU s | MB per CPU s | starloom is faster by |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, value in seconds.items():
        ratio = "" if name == "starloom" else f"{value / ours:.2f} ×"  # noqa: RUF001
        lines.append(
            f"| {name} | {value:.4f} | {len(bodies) / value:,.0f} | {size / value:.1f} | {ratio} |"
        )
    lines += [
        "",
        (
            "Bodies whose rendered Markdown differs from their HTML, as a reader sees it "
            "(a body may count in several rows):"
        ),
        "",
        f"| | {' | '.join(counts)} | what it is |",
        f"|---{'|---:' * len(counts)}|---|",
    ]
    spellings = {f"- {name}": text for name, (_, text) in SPELLINGS.items()}
    spellings["- other"] = "blanks, order of emphasis marks, entities"
    for kind, explanation in (EXPLAINED | spellings).items():
        cells = " | ".join(f"{count[kind]:,}" for count in counts.values())
        lines.append(f"| {kind} | {cells} | {explanation} |")
    lines += [
        "",
        (
            "The structure that starloom changes has no meaning: an empty list item, emphasis "
            "within emphasis of its own kind. Rows that begin with a dash divide `only spelling`."
        ),
    ]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def main() -> None:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    data = os.environ.get("STARLOOM_REAL_DATA")
    if not data:
        sys.exit("STARLOOM_REAL_DATA is not set: it names the folder that holds the real dumps")
    bodies = read_bodies(Path(data))
    converters = {"starloom": html_to_markdown, **load_peers()}
    seconds = measure(converters, bodies, rounds)
    print(report(bodies, seconds, compare(converters, bodies), rounds))


if __name__ == "__main__":
    main()
