"""The control tokens of fill-in-the-middle, by the names that model families gave them."""

from typing import NamedTuple

from tokenizers import Tokenizer

from pipelines.errors import TemplateError
from pipelines.render.pieces import END_OF_TEXT


class Sentinels(NamedTuple):
    """What stands before the prefix, the middle and the suffix, and what ends the middle."""

    prefix: str
    middle: str
    suffix: str
    end: str = END_OF_TEXT


STARCODER = Sentinels("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
FORMS = {
    # StarCoder, StarCoder2, Granite code.
    "starcoder": STARCODER,
    "santacoder": Sentinels("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    "codellama": Sentinels("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"),
    # DeepSeek marks the hole where the suffix begins.
    "deepseek": Sentinels(
        "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>"
    ),
    # Qwen2.5-Coder, CodeGemma.
    "qwen": Sentinels("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
}


def find_sentinels(tokenizer: Tokenizer, form: str = "auto") -> Sentinels:
    """Return the sentinels of a form, or of the first form of which the tokenizer has all.

    Raises TemplateError naming what is missing.
    """
    candidates = FORMS if form == "auto" else {form: FORMS[form]}
    missing = {
        name: [token for token in sentinels if tokenizer.token_to_id(token) is None]
        for name, sentinels in candidates.items()
    }
    closest = min(missing, key=lambda name: len(missing[name]))
    if not missing[closest]:
        return FORMS[closest]
    if len(missing[closest]) < len(set(FORMS[closest][:3])) or form != "auto":
        raise TemplateError(
            f"the tokenizer has no {', '.join(map(repr, missing[closest]))}, which fill-in-the-"
            f"middle in the form of {closest} renders; add it to the tokenizer as a special token, "
            "or set fim.fim_rate: 0"
        )
    known = "; ".join(f"{name}: {' '.join(FORMS[name][:3])}" for name in FORMS)
    raise TemplateError(
        "fill-in-the-middle needs sentinels, and this tokenizer has those of no known form "
        f"({known}); use a tokenizer that has them, or set fim.fim_rate: 0"
    )
