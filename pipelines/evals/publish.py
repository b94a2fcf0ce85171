"""Publishes an accepted model to `data/models/<recipe>`, and keeps the one it replaces.

`<recipe>` and `<recipe>.previous` are links to complete folders, each replaced by one rename: at
every instant, a reader finds a whole model under the name.
"""

import os
import shutil
import tempfile
from pathlib import Path

from pipelines.errors import StarloomError
from pipelines.evals.card import CARD
from pipelines.manifest import sha256_file
from pipelines.plan import data_root
from pipelines.runs import Run
from pipelines.store import locked, sync_folder

# The Hub shows README.md of a model's folder as its card.
PUBLISHED_CARD = "README.md"


def publish(run: Run) -> Path:
    """Copy the model and card of an accepted run to `data/models/<recipe>` and return that path.

    Raises StarloomError where the run is rejected, not evaluated in its present state, or has no
    card. Publishing what is published already changes nothing.
    """
    check_accepted(run)
    name = run.recipe().name
    models = data_root() / "models"
    link, previous = models / name, models / f"{name}.previous"
    with locked(models / f".lock-{name}"):
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=models))
        try:
            _copy(run, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        if link.is_dir() and _hashes(link) == _hashes(folder):
            shutil.rmtree(folder)
            return link
        if link.is_symlink():
            _point(previous, link.readlink())
        _point(link, Path(folder.name))
        kept = {path.resolve() for path in (link, previous)}
        for old in models.glob(f".{name}.*/"):
            if old.resolve() not in kept:
                shutil.rmtree(old)
    return link


def check_accepted(run: Run) -> None:
    """Raise StarloomError unless the gate has accepted the run as it is, and it has a card."""
    scorecard = run.read("scorecard.json")
    again = f"`starloom run {run.info()['recipe']}` evaluates it"
    if not scorecard or not run.trained:
        raise StarloomError(f"run {run.name} is not evaluated yet: {again}")
    if scorecard["key_parts"]["training"] != sha256_file(run.path / "training.json"):
        raise StarloomError(f"run {run.name} was trained again after its evaluation: {again}")
    if not scorecard["accepted"]:
        raise StarloomError(f"run {run.name} is not published: {scorecard['reason']}")
    if not (run.path / CARD).is_file():
        raise StarloomError(f"run {run.name} has no {CARD} yet: `starloom run` writes it")


def _copy(run: Run, folder: Path) -> None:
    shutil.copytree(run.model, folder, dirs_exist_ok=True)
    shutil.copyfile(run.path / CARD, folder / PUBLISHED_CARD)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    folder.chmod(0o755)
    sync_folder(folder)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def _point(link: Path, target: Path) -> None:
    """Let a link point to a target by one rename."""
    part = link.with_name(f".link-{link.name}")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)
    sync_folder(link.parent)
