"""HTML of posts and pages to Markdown: one pass over the tags, no tree, no recursion.

The tags are found with one regular expression that follows the HTML standard's tokenizer; the
rules of its tree builder that matter for text (implied end tags, misnested formatting, scopes of
lists and tables) are applied while writing. Time is linear in the input for any input.

What Markdown has no words for stays as the HTML that Markdown allows: `sub`, `sup`, `kbd`,
`details`. A spoiler becomes `>!`. Scripts, styles, iframes and comments are dropped; the language
hints of Stack Exchange in comments are honoured. Line breaks within a paragraph stay where the
author put them. `data:` addresses of images are dropped, their alternative text is kept.
"""

import re

from pipelines.sources import html_containers, html_inline, html_tables, html_walk
from pipelines.sources.html_text import CHUNK, prepare_prose
from pipelines.sources.html_walk import RAW_TEXT, Handler, RawTextFound, Walker

_ATTRIBUTES = r"[^>=]*+(?:=\s*+(?:\"[^\"]*+(?:\"|\Z)|'[^']*+(?:'|\Z)|(?![\"'])[^\s>]*+)[^>=]*+)*+"
# Text, name and attributes alternate. Inline code without tags in it is one token: its text must
# not be handled as prose. A tag cut off by the end of the input is a tag, so no try is in vain.
_TAGS = re.compile(rf"<(/?[a-zA-Z][^\s/>]*+)((?:(?<=<code)>[^<]*+</code|{_ATTRIBUTES}))(?:>|\Z)")
_TAGS_BLIND_TO_QUOTES = re.compile(r"<(/?[a-zA-Z][^\s/>]*+)([^>]*+)>")
_NO_TEXT = re.compile(
    r"<(?:!--(?P<comment>.*?)(?:--!?>|\Z)"
    r"|[!?][^>]*(?:>|\Z)"
    rf"|(?P<raw>{'|'.join(RAW_TEXT)})(?=[\s/>]){_ATTRIBUTES}(?:>|\Z)"
    r".*?(?:</(?P=raw)(?=[\s/>])[^>]*(?:>|\Z)|\Z)"
    rf"|/?[a-zA-Z]{_ATTRIBUTES}(?:>|\Z))",
    re.DOTALL | re.IGNORECASE,
)
_NOT_A_TAG = re.compile("<[!?]")
_HINT = re.compile(r"\s*language(-all)?:\s*(?:lang(?:uage)?-)?([\w+#.-]+)\s*\Z")
_HANDLERS: dict[str, Handler] = {
    **html_walk.HANDLERS,
    **html_inline.HANDLERS,
    **html_containers.HANDLERS,
    **html_tables.HANDLERS,
}


def html_to_markdown(html: str) -> str:
    """Return the Markdown of an HTML body; never raises, whatever the input.

    NUL and U+0001 become U+FFFD, as the HTML standard asks of NUL.
    """
    if "\x00" in html or "\x01" in html:
        html = html.replace("\x00", "\N{REPLACEMENT CHARACTER}")
        html = html.replace("\x01", "\N{REPLACEMENT CHARACTER}")
    if "\r" in html:
        html = html.replace("\r\n", "\n").replace("\r", "\n")
    try:
        return _convert(html, cut=False)
    except RawTextFound:
        return _convert(_NO_TEXT.sub(_replace_without_text, html), cut=True)


def _convert(html: str, *, cut: bool) -> str:
    """Convert; raise RawTextFound if comments and the like are not yet `cut` and there are any."""
    tokens = _TAGS.split(html)
    if len(tokens) > 1 and not tokens[-1] and html[-1] != ">":
        tokens = _resplit_cut_tag(html, tokens)
    prose = CHUNK.join(tokens[::3])
    if "<" in prose and not cut and _NOT_A_TAG.search(prose):
        raise RawTextFound
    texts, risky = prepare_prose(prose)
    lead = texts.pop(0)
    walker = Walker(tokens, texts, _HANDLERS)
    if risky:
        walker.risky = walker.special = True
    return walker.convert(lead)


def _resplit_cut_tag(html: str, tokens: list[str]) -> list[str]:
    """Keep the text that a tag cut off by the end swallowed: quotes mean nothing in there."""
    start = len(html) - len(tokens[-3]) - len(tokens[-2]) - 1
    end = html.rfind(">", start) + 1
    if not end:
        return [*tokens[:-4], tokens[-4] + html[start:]]
    found = _TAGS_BLIND_TO_QUOTES.split(html[start:end])
    return [*tokens[:-4], tokens[-4] + found[0], *found[1:-1], found[-1] + html[end:]]


def _replace_without_text(match: re.Match[str]) -> str:
    """Return what stays of a comment, declaration or raw text element; other tags stay."""
    comment = match["comment"]
    if comment is not None:
        hint = _HINT.match(comment)
        return f"<x-language {hint[1] or ''} {hint[2]}>" if hint else ""
    return "" if match["raw"] or match[0][1] in "!?" else match[0]
