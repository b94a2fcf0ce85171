"""What of a text is prose: without code, markup, URLs and the names of who speaks.

Markup and role markers cost the guess at a language accuracy; code is guessed to be Ukrainian.
"""

import re

# A guess costs time with length and gains nothing beyond this.
PROSE_CHARS = 1000
READ_CHARS = 8000

FENCED = re.compile(r"(```|~~~).*?(?:\1|\Z)", re.DOTALL)
INLINE = re.compile(r"(?<!`)(`{1,2})(?!`)[^`\n]+\1(?!`)")
DOCTEST = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?: .*)?$", re.MULTILINE)
# numpydoc's section titles and "name : type" lines halve the scores of English docstrings.
SECTION = re.compile(r"^[ \t]*\S[^\n]*\n[ \t]*(?:-{3,}|={3,})[ \t]*$", re.MULTILINE)
PARAMETER = re.compile(r"^[ \t]*[*\w]+(?:, ?[*\w]+)* :.*$", re.MULTILINE)
# Code without a fence: lines that end as no sentence does. A few may be prose after all.
CODE_END = re.compile(r"(?:[;{}]|\) ?:|=>)[ \t]*$", re.MULTILINE)
CODE_LINE = re.compile(rf"^[^\n]*{CODE_END.pattern}", re.MULTILINE)
CODE_MARKS = (";", "{", "}", "):", ") :", "=>")
CODE_LINES = 3
TAG = re.compile(r"<(?:/?[A-Za-z!][^<>]{0,200}|\|[^|<>]{1,30}\|)>")
LINK = re.compile(r"!?\[([^\[\]]{0,200})\]\([^()\s]{0,300}\)")
URL = re.compile(r"\bhttps?://[^\s<>\"]{1,500}")
ROLE = re.compile(
    r"^[ \t]*(?:#{1,4} ?|\*\*)?(?:human|user|prompter|assistant|bot|system|question|answer"
    r"|instruction|response|input|output|[QA])(?:\*\*)? ?:(?:\*\*)?",
    re.MULTILINE | re.IGNORECASE,
)
MARKUP = str.maketrans(dict.fromkeys("*#|", " "))


def strip_code(text: str) -> str:
    r"""Return the start of a text's prose on one line: no code, markup, URLs or role markers.

    >>> strip_code("Call `f(x)` like\n>>> f(1)\nthis.")
    'Call like this.'
    >>> strip_code("<|user|> **See** [the docs](https://h.org).")
    'See the docs .'
    """
    text = text[:READ_CHARS]
    if "`" in text or "~~~" in text:
        text = INLINE.sub(" ", FENCED.sub(" ", text))
    if ">>>" in text:
        text = DOCTEST.sub(" ", text)
    if ("---" in text or "===" in text) and SECTION.search(text):
        text = PARAMETER.sub(" ", SECTION.sub(" ", text))
    if any(mark in text for mark in CODE_MARKS) and len(CODE_END.findall(text)) >= CODE_LINES:
        text = CODE_LINE.sub(" ", text)
    return " ".join(_strip_markup(text).split())[:PROSE_CHARS]


def _strip_markup(text: str) -> str:
    if "<" in text:
        text = TAG.sub(" ", text)
    if "](" in text:
        text = LINK.sub(r"\1 ", text)
    if "://" in text:
        text = URL.sub(" ", text)
    if ":" in text:
        text = ROLE.sub(" ", text)
    return text.translate(MARKUP) if "*" in text or "#" in text or "|" in text else text
