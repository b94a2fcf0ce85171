"""Every error a user can cause or mend, one sentence each.

StarloomError
+-- RecipeError          the recipe, its overrides or its name
+-- SourceError          raw input that cannot be read at all
+-- StoreError           a stage's files do not match their manifest
+-- TemplateError        a dialogue or tokenizer the template cannot render
+-- PreflightError       something the run needs is missing on this machine
+-- DiskFull             no space left while writing
+-- TrainingError        training stopped and cannot go on by itself
|   +-- Interrupted      training stopped early; a checkpoint to go on from exists
+-- ServiceError         server, worker or port: what `starloom up` manages

The text says where, the value, what was expected and what to do. The command line prints it
on one line without a traceback; a bug raises something else and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class StarloomError(Exception):
    """Base of all errors that a user can act on."""


class RecipeError(StarloomError):
    """The recipe is wrong; every problem is listed."""


class SourceError(StarloomError):
    """Raw input that cannot be read as a whole (single bad rows are quarantined instead)."""


class StoreError(StarloomError):
    """Stored files are missing, truncated or changed."""


class TemplateError(StarloomError):
    """A dialogue cannot be rendered with this template and tokenizer."""


class PreflightError(StarloomError):
    """The machine lacks something the run needs."""


class DiskFull(StarloomError):
    """The disk filled up; nothing that was complete is lost."""


class TrainingError(StarloomError):
    """Training failed."""


class Interrupted(TrainingError):
    """Training stopped before its last step; start it again to resume."""


class ServiceError(StarloomError):
    """The Prefect server, a worker or a port is not as needed."""


def did_you_mean(value: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ", did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(value, list(known), n=1, cutoff=cutoff)
    return f", did you mean {close[0]!r}?" if close else ""
