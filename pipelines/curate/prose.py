"""What of a text is prose: without code, markup, URLs and the names of who speaks.

Markup and role markers cost the guess at a language accuracy; code is guessed to be Ukrainian.
"""

import re

# A guess costs time with length: of 354 long messages 351 get their language from this much, and
# 353 from twice as much, at a fifth more of the stage's time.
PROSE_CHARS = 500
READ_CHARS = 8000

FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# At the start of a line; but four or more right below a line underline it, in reStructuredText.
TILDES = re.compile(
    r"^ {0,3}~~~(?!(?<=[^\n]\n~~~)~+[ \t]*$).*?(?:~~~|\Z)", re.DOTALL | re.MULTILINE
)
# Each pattern begins with a character of its own, which is found without trying every place.
INLINE = re.compile(r"`(?<!``)(`?)(?!`)[^`\n]+`\1(?!`)")
DOCTEST = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?: .*)?$", re.MULTILINE)
# A block that stands deeper than a line before it that ends in "::" is code in reStructuredText, as
# in docstrings, but for the text of a note.
LITERAL = re.compile(r"::[ \t]*\n(?:[ \t]*\n)+(?=([ \t]+)\S)")
BLOCK = re.compile(r"([ \t]+).*(?:\n(?:\1.*|[ \t]*(?=\n|\Z)))*")
NOTE = re.compile(
    r"[ \t]*\.\. (?:attention|caution|danger|error|hint|important|note|seealso|tip|todo|warning)$"
)
# numpydoc's section titles and "name : type" lines halve the scores of English docstrings.
UNDERLINE = re.compile(r"\n[ \t]*(?:-{3,}|={3,})[ \t]*(?=\n|\Z)")
PARAMETER = re.compile(r"^[ \t]*[*\w]+(?:, ?[*\w]+)* :.*$", re.MULTILINE)
# Code without a fence: lines that end as no sentence does. A few may be prose after all.
CODE_ENDS = (";", "{", "}", "):", ") :", "=>")
CODE_LINES = 3
TAG = re.compile(r"<(?:/?[A-Za-z!][^<>]{0,200}|\|[^|<>]{1,30}\|)>")
LINK = re.compile(r"!?\[([^\[\]]{0,200})\]\([^()\s]{0,300}\)")
URL = re.compile(r"http(?<=\bhttp)s?://[^\s<>\"]{1,500}")
ROLES = (
    "human", "user", "prompter", "assistant", "bot", "system", "question", "answer", "instruction",
    "response", "input", "output", "q", "a",
)  # fmt: skip
LONGEST_ROLE = max(map(len, ROLES))
ROLE = re.compile(
    rf"^[ \t]*(?:#{{1,4}} ?|\*\*)?(?:{'|'.join(ROLES)})(?:\*\*)? ?:(?:\*\*)?",
    re.MULTILINE | re.IGNORECASE,
)


def strip_code(text: str) -> str:
    r"""Return the start of a text's prose on one line: no code, markup, URLs or role markers.

    >>> strip_code("Call `f(x)` like\n>>> f(1)\nthis.")
    'Call like this.'
    >>> strip_code("<|user|> **See** [the docs](https://h.org).")
    'See the docs .'
    """
    text = text[:READ_CHARS]
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    if "```" in text:
        text = FENCED.sub(" ", text)
    if "~~~" in text:
        text = TILDES.sub(" ", text)
    if "`" in text:
        text = INLINE.sub(" ", text)
    if ">>>" in text:
        text = DOCTEST.sub(" ", text)
    if "::" in text:
        text = _strip_literals(text)
    if "---" in text or "===" in text:
        text = _strip_sections(text)
    if ";" in text or "{" in text or "}" in text or ")" in text or "=>" in text:
        text = _strip_code_lines(text)
    return " ".join(_strip_markup(text).split())[:PROSE_CHARS]


def _strip_literals(text: str) -> str:
    parts, start = [], 0
    for mark in LITERAL.finditer(text):
        line = text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()]
        indent = len(line) - len(line.lstrip(" \t"))
        if mark.start() < start or len(mark[1]) <= indent or NOTE.match(line):
            continue
        if block := BLOCK.match(text, mark.end()):
            parts.append(text[start : mark.start()])
            start = block.end()
    return " ".join([*parts, text[start:]])


def _strip_sections(text: str) -> str:
    """Take out underlined titles and, of a text with one, lines of parameters.

    The underline is looked for, not the title: every line could be one.
    """
    parts, start = [], 0
    for line in UNDERLINE.finditer(text):
        title = max(text.rfind("\n", start, line.start()) + 1, start)
        if text[title : line.start()].strip(" \t"):
            parts.append(text[start:title])
            start = line.end()
    if not parts:
        return text
    text = " ".join([*parts, text[start:]])
    return PARAMETER.sub(" ", text) if " :" in text else text


def _strip_code_lines(text: str) -> str:
    lines = text.split("\n")
    is_code = [line.rstrip(" \t").endswith(CODE_ENDS) for line in lines]
    if sum(is_code) < CODE_LINES:
        return text
    return "\n".join(" " if code else line for line, code in zip(lines, is_code, strict=True))


def _strip_markup(text: str) -> str:
    if "<" in text:
        text = TAG.sub(" ", text)
    if "](" in text:
        text = LINK.sub(r"\1 ", text)
    if "://" in text:
        text = URL.sub(" ", text)
    if ":" in text and _may_name_role(text):
        text = ROLE.sub(" ", text)
    return text.replace("*", " ").replace("#", " ").replace("|", " ")


def _may_name_role(text: str) -> bool:
    """Say whether a role stands before a colon: most colons end other words, at less cost."""
    for part in text.split(":")[:-1]:
        head = part[part.rfind("\n") + 1 :].strip("#* \t")
        if len(head) <= LONGEST_ROLE and head.lower() in ROLES:
            return True
    return False
