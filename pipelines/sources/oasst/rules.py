"""The rules by which messages of a tree are left out. What data does not tell, is no objection."""

import json
import re
from collections.abc import Iterable, Mapping

from pipelines.engine import Params
from pipelines.sources.oasst.messages import Message

FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
WORD = re.compile(r"[a-z][a-z+#]*")
# Words of programming that are rare elsewhere; a dialogue with two different ones is about code.
CODE_WORDS = frozenset(
    """
    python java javascript typescript html css sql bash linux git github regex json yaml api
    compiler compile debug debugger stacktrace docker kubernetes numpy pandas pytorch tensorflow
    haskell kotlin golang rustc codebase programming programmer pseudocode boolean recursion
    recursive c++ c# php perl algorithm refactor backend frontend django flask npm
    """.split()
)


def find_fault(message: Message, params: Params) -> tuple[str, str] | None:
    """Return (reason, detail) why a message is left out by itself, or None.

    `params` holds the settings tree_states, allow_synthetic, allow_failed_review, languages,
    max_labels and min_quality.
    """
    states = params["tree_states"]
    if states and message["state"] is not None and message["state"] not in states:
        return "tree_state", f"its tree is {message['state']}"
    if message["deleted"]:
        return "deleted", "marked as deleted"
    if message["synthetic"] and not params["allow_synthetic"]:
        return "synthetic", f"written by {message['model'] or 'a model'}"
    if message["reviewed"] is False and not params["allow_failed_review"]:
        return "failed_review", "its reviewers turned it down"
    if not speaks(message["lang"], params["languages"]):
        return f"language:{message['lang']}", "its language is none of the wanted ones"
    return _label_fault(labels_of(message), params)


def speaks(lang: str | None, languages: Iterable[str]) -> bool:
    """Say whether a BCP 47 tag is one of the languages or, as pt-BR of pt, a kind of one."""
    wanted = {language.lower() for language in languages}
    if not wanted or lang is None:
        return True
    tag = lang.lower().replace("_", "-")
    return tag in wanted or tag.split("-")[0] in wanted


def labels_of(message: Message) -> dict[str, float]:
    """Return the labels of a message by name."""
    labels: dict[str, float] = json.loads(message["labels"] or "{}")
    return labels


def _label_fault(labels: Mapping[str, float], params: Params) -> tuple[str, str] | None:
    for name, most in params["max_labels"].items():
        if labels.get(name, 0.0) > most:
            return f"label:{name}", f"{name} {labels[name]:.2f} is above {most}"
    least = params["min_quality"]
    if labels.get("quality", 1.0) < least:
        return "label:quality", f"quality {labels['quality']:.2f} is below {least}"
    return None


def summarize_labels(messages: Iterable[Message]) -> dict[str, list[float]]:
    """Return [least, greatest] of each label over some messages."""
    found: dict[str, list[float]] = {}
    for message in messages:
        for name, value in labels_of(message).items():
            found.setdefault(name, []).append(value)
    return {name: [min(values), max(values)] for name, values in found.items()}


def code_words(text: str) -> set[str]:
    """Return the words of programming in a text, "```" for a fence.

    >>> sorted(code_words("Is Python or C++ better?"))
    ['c++', 'python']
    """
    found = set(CODE_WORDS.intersection(WORD.findall(text.lower())))
    return found | {"```"} if FENCE.search(text) else found


def code_sign(found: Iterable[set[str]]) -> str | None:
    """Say by what a dialogue shows to be about code: a "fence", two "words", or None."""
    words = set().union(*found)
    if "```" in words:
        return "fence"
    return "words" if len(words) > 1 else None
