"""Hardware files: the shipped ones by name, one's own by path. Every problem is said at once."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.errors import RecipeError, did_you_mean
from pipelines.overrides import load_mapping
from pipelines.recipe_problems import explain
from pipelines.settings.hardware import Hardware

FOLDER = "hardware"


def hardware_names() -> list[str]:
    """Return the names of the shipped hardware files."""
    root = resources.files("pipelines.recipes").joinpath(FOLDER)
    return sorted(p.name.removesuffix(".yaml") for p in root.iterdir() if p.name.endswith(".yaml"))


def is_hardware_path(name: str) -> bool:
    """Return whether a recipe's `hardware` is a file of one's own rather than a shipped name."""
    return Path(name).suffix in (".yaml", ".yml")


def locate_hardware(name: str) -> str:
    """Return a shipped name as it is, and a path as an absolute one; ValueError for others."""
    if is_hardware_path(name):
        return str(Path(name).expanduser().absolute())
    known = hardware_names()
    if name not in known:
        raise ValueError(
            f"no such hardware{did_you_mean(name, known)} (there are: {', '.join(known)}, "
            "or give the path of a .yaml file)"
        )
    return name


def read_hardware(name: str) -> Hardware:
    """Load a hardware file by shipped name or path; RecipeError listing every problem."""
    try:
        name = locate_hardware(name)
    except ValueError as error:
        raise RecipeError(f"hardware: {error}, got {name!r}") from None
    if is_hardware_path(name):
        folder, where = Path(name).parent, name
        try:
            text = Path(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"hardware {where}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"hardware {where}: cannot be read as UTF-8 ({error})") from error
    else:
        folder, where = Path(), name
        text = resources.files("pipelines.recipes").joinpath(f"{FOLDER}/{name}.yaml").read_text()
    return _parse(text, f"hardware {where}", folder)


def _parse(text: str, where: str, folder: Path) -> Hardware:
    values = load_mapping(text, where)
    problems = []
    if isinstance(values.get("deepspeed"), str):
        try:
            values["deepspeed"] = _read_json(folder / Path(values["deepspeed"]).expanduser())
        except ValueError as error:
            problems.append(f"deepspeed: {error}")
            del values["deepspeed"]
    for key in ("hostfile", "environment_script"):
        if isinstance(values.get(key), str):
            values[key] = str((folder / Path(values[key]).expanduser()).absolute())
    try:
        hardware = Hardware.model_validate(values)
    except ValidationError as error:
        problems += explain(Hardware, error)
    if problems:
        raise RecipeError(f"{where}: " + "; ".join(problems))
    return hardware


def _read_json(path: Path) -> dict[str, Any]:
    """Return the keys of a JSON file; ValueError saying what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {content!r}"[:200])  # noqa: TRY004
    return content
