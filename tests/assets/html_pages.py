"""What a reader sees of HTML, and of Markdown once it is rendered: words, code, structure."""

from collections import Counter
from typing import NamedTuple

from lxml import etree
from markdown_it import MarkdownIt

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
RENDERER.normalizeLinkText = str  # an autolink shows its address as it is written
BREAKING = frozenset(
    "p li br pre h1 h2 h3 h4 h5 h6 td th tr blockquote hr ul ol div table dt dd dl details "
    "summary section caption".split()
)
DROPPED = ("script", "style", "iframe", "template", "title")
COUNTED = frozenset("a strong em img ul ol li blockquote h1 h2 h3 h4 h5 h6 pre hr td th".split())


class Page(NamedTuple):
    words: list[str]
    blocks: list[str]  # each pre, exactly, one line end at its end
    spans: list[str]  # each code outside pre, runs of blanks as one
    tags: Counter


def read_page(html: str) -> Page:
    """Return what lxml reads from HTML."""
    # Without recover: it is the default of the HTML parser, and huge_tree lifts its depth limit.
    root = etree.fromstring(f"<div>{html}</div>", etree.HTMLParser(huge_tree=True))
    etree.strip_elements(root, *DROPPED, etree.Comment, with_tail=False)
    blocks = ["".join(pre.itertext()).removeprefix("\n") for pre in root.iter("pre")]
    codes = list(root.iter("code", "tt", "samp"))
    spans = [
        " ".join("".join(code.itertext()).split())
        for code in codes
        if not any(parent.tag in ("pre", "code", "tt", "samp") for parent in code.iterancestors())
    ]
    tags = Counter(node.tag for node in root.iter() if node.tag in COUNTED)
    for node in root.iter():
        if node.tag in BREAKING:
            node.text, node.tail = f" {node.text or ''} ", f" {node.tail or ''}"
    return Page(
        "".join(root.itertext()).split(),
        [block if block.endswith("\n") else f"{block}\n" for block in blocks if block.strip()],
        [span for span in spans if span],
        tags,
    )


def render(markdown: str) -> str:
    """Return Markdown as HTML."""
    return RENDERER.render(markdown)
