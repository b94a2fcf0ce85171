"""Says what is wrong with a recipe in words: the dotted key, the problem, and what may be meant."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.errors import did_you_mean
from pipelines.settings.sources import source_types

# The login of an address, and the values of its query.
SECRETS = re.compile(r"(://)[^/@\s]+(@)|([?&][\w.-]+=)[^&\s'\"]+")

Location = tuple[str | int, ...]


def explain(recipe: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Yield one line for each problem."""
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "too_short" and any(
            other["loc"][:1] == problem["loc"] for other in problems if other is not problem
        ):
            continue  # pydantic counts the broken entries as absent
        location = problem["loc"]
        key = ".".join(_written(location))
        if problem["type"] == "extra_forbidden":
            known = _known_keys(recipe, location[:-1])
            hint = did_you_mean(str(location[-1]), known) or f" (known: {', '.join(known)})"
            yield f"{key}: unknown key{hint}"
        elif problem["type"] == "missing":
            yield f"{key}: required, but not set"
        elif problem["type"] == "union_tag_not_found":
            yield f"{key}.type: required, but not set (known: {', '.join(source_types())})"
        elif problem["type"] == "union_tag_invalid":
            tag, types = problem["ctx"]["tag"], source_types()
            hint = did_you_mean(tag, types)
            yield f"{key}.type: no such type{hint} (known: {', '.join(types)}), got {tag!r}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = "" if isinstance(problem["input"], dict) else _shown(key, problem["input"])
            yield f"{key}: {message}{value}" if key else message


def _shown(key: str, value: Any) -> str:
    """Return a value as a message shows it, without what may be a secret put in a wrong place."""
    if key.endswith("_env"):
        return "; give the variable's name, not what it holds"
    return ", got " + SECRETS.sub(r"\1\3***\2", repr(value))


def _written(location: Location) -> list[str]:
    """Return the keys as the file has them: pydantic adds the type after a source's number."""
    parts = [str(part) for part in location]
    return [*parts[:2], *parts[3:]] if parts[:1] == ["sources"] and len(parts) > 2 else parts


def _known_keys(section: type[BaseModel], location: Location) -> list[str]:
    """Return the keys that exist at a place in the recipe."""
    for part in location:
        if isinstance(part, int):
            continue
        if part in source_types():
            section = source_types()[part]
            continue
        field = section.model_fields.get(part)
        inner = _section_of(field.annotation) if field else None
        if inner is None and part != "sources":
            return []
        section = inner or section
    return sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
