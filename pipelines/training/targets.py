"""Which layers an adapter's target patterns name.

PEFT is silent about a pattern that matches nothing as long as another one has a match: the seeds
name `q_attn`, which no decoder-only GPTBigCode has, and LLaMA's names reach half of a StarCoder2.
"""

import re
from collections.abc import Iterable
from typing import Any

from pipelines.errors import RecipeError, did_you_mean
from pipelines.training.architectures import LINEAR_LAYERS

ALL_LINEAR = "all-linear"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def resolve_targets(model: Any, patterns: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the layers each pattern matches: a name, the end of one, or all-linear.

    Works on the meta device too. Raises RecipeError naming the patterns that match no layer and
    the layers that there are; the output head counts as none, since it may be tied.
    """
    names = _adaptable(model)
    found = {
        pattern: [n for n in names if pattern == ALL_LINEAR or f".{n}".endswith(f".{pattern}")]
        for pattern in patterns
    }
    unmatched = [pattern for pattern, matched in found.items() if not matched]
    if unmatched:
        raise RecipeError(_unmatched(unmatched, leaf_names(names), model.config.model_type))
    return found


def target_problems(patterns: Iterable[str], model_type: str) -> list[str]:
    """Say which patterns match no layer of a known architecture, without building a model."""
    known = sorted(LINEAR_LAYERS.get(model_type, ()))
    unmatched = [
        pattern
        for pattern in patterns
        if pattern != ALL_LINEAR and pattern.rpartition(".")[2] not in known
    ]
    return [_unmatched(unmatched, known, model_type)] if known and unmatched else []


def _unmatched(patterns: list[str], known: list[str], model_type: str) -> str:
    problems = [f"{p!r} matches no layer{did_you_mean(p, known)}" for p in patterns]
    return (
        f"adapter.target_modules: {'; '.join(problems)} (this {model_type} has: {', '.join(known)})"
    )


def leaf_names(names: Iterable[str]) -> list[str]:
    """Return the distinct last parts of module names, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})


def describe_targets(found: dict[str, list[str]]) -> list[str]:
    """Return one line a pattern: how many layers it matches, and which, numbers as a range."""
    return [
        f"{pattern} -> {len(names)} layer{'s' * (len(names) > 1)}: {', '.join(_with_ranges(names))}"
        for pattern, names in found.items()
    ]


def _adaptable(model: Any) -> list[str]:
    from torch import nn

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def _with_ranges(names: list[str]) -> list[str]:
    """Collapse h.0.attn.c_attn, h.1.attn.c_attn, ... to h.0-23.attn.c_attn."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = NUMBER.search(name)
        key = NUMBER.sub("*", name, count=1)
        numbers.setdefault(key, []).extend([int(match[0])] if match else [])
    return [
        key.replace("*", str(n[0]) if len(n) == 1 else f"{n[0]}-{n[-1]}", 1) if n else key
        for key, n in numbers.items()
    ]
