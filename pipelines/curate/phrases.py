"""Phrases that give an answer away as a refusal, or as one of another model about itself.

Both lists are off unless a recipe names them: they also hit answers that quote such a phrase.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

LISTS: dict[str, tuple[str, ...]] = {
    "refusal": (
        "i am not able to assist",
        "i am unable to",
        "i can't assist",
        "i can't fulfill",
        "i can't help with that",
        "i cannot assist",
        "i cannot fulfill",
        "i cannot help with that",
        "i must decline",
        "i won't be able to help",
        "i'm not able to assist",
        "i'm sorry, but i can't",
        "i'm sorry, but i cannot",
        "i'm unable to",
    ),
    "self-reference": (
        "as a large language model",
        "as a language model",
        "as an ai",
        "as an artificial intelligence",
        "i am a language model",
        "i am an ai",
        "i am chatgpt",
        "i'm a language model",
        "i'm an ai",
        "i'm chatgpt",
        "my knowledge cutoff",
        "my training data",
        "trained by openai",
    ),
}


def gather_phrases(lists: Iterable[str], phrases: Iterable[str]) -> list[str]:
    """Return the phrases of the named lists and a recipe's own, normalised, sorted, each once."""
    listed = [phrase for name in lists for phrase in LISTS[name]]
    return sorted({_normalise(phrase) for phrase in [*listed, *phrases]})


def find_phrase(text: str, phrases: Iterable[str]) -> str | None:
    """Return the first of the normalised phrases in a text, whatever its case and white space.

    A phrase counts where words begin and end: "As an AI, I ..." holds "as an ai", and "has an air"
    does not.
    """
    normal = _normalise(text)
    found = (phrase for phrase in phrases if phrase in normal and _bounded(phrase).search(normal))
    return next(found, None)


def _normalise(text: str) -> str:
    return " ".join(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())


@lru_cache(1024)
def _bounded(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")
