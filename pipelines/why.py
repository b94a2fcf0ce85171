"""Explains a rebuild: which component of a stage's key differs from the build before."""

from collections.abc import Iterator
from typing import Any

from pipelines.store import Store


def explain_rebuild(store: Store, stage: str, recipe: str | None = None) -> list[str]:
    """Return lines that say why the latest build of a stage was not a hit.

    Compares it with the latest other key of the same recipe used before it.
    """
    uses = [use for use in store.log(stage) if recipe in (None, use["recipe"])]
    builds = [place for place, use in enumerate(uses) if not use["cached"]]
    if not builds:
        of_recipe = f" for recipe {recipe!r}" if recipe else ""
        return [f"{stage}: never built{of_recipe}"]
    latest = uses[builds[-1]]
    lines = [f"{stage}: built {latest['time']} for {latest['recipe']}, key {latest['key'][:16]}"]
    before = [use for use in uses[: builds[-1]] if use["recipe"] == latest["recipe"]]
    if not before:
        return [*lines, "  first build for this recipe"]
    previous = before[-1]
    if previous["key"] == latest["key"]:
        return [*lines, "  same key as before: its files were removed or damaged"]
    lines.append(f"  compared with {previous['time']}, key {previous['key'][:16]}")
    lines += [f"  {line}" for line in differences(previous["parts"], latest["parts"])]
    reused = sum(use["cached"] and use["key"] == latest["key"] for use in uses)
    return [*lines, f"  reused {reused} times since"] if reused else lines


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield "key: old -> new" for every leaf that differs between two key parts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            path = f"{where}.{key}" if where else key
            yield from differences(old.get(key), new.get(key), path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, f"{where}.{place}")
    elif old != new:
        yield f"{where}: {_short(old)} -> {_short(new)}{_meaning(where)}"


def _short(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_digest else text if len(text) <= 80 else f"{text[:77]}..."


def _meaning(where: str) -> str:
    if where == "code":
        return "  (the code of the stage changed)"
    if where.startswith("upstream."):
        return "  (its input changed: ask `starloom why` of that stage)"
    return ""
