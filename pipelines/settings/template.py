"""The recipe's section `template`: how a record becomes text, and what of it is trained."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.settings.section import Fraction, Section

TemplateName = Literal[
    "plain", "alpaca", "question-answer", "sc2-instruct", "starchat", "chatml", "zephyr", "oasst",
    "human-assistant", "few-shot", "model", "file",
]  # fmt: skip


JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


class Template(Section):
    """How a record becomes text. `train_on_prompt` puts the prompt's tokens into the loss too.

    `variant` is one of StarChat's own; `file` holds few-shot's dialogues, or with `name: file` a
    template: turns in YAML, or a .jinja chat template whose `control_tokens` are named here.
    `train_role_header` trains the answers' headers as StarChat's blog post does. `system` is for
    dialogues without a system turn, with `system_override` for all; `system_dropout` is the share
    trained without any. `alternation: repair` mends the order of turns; what stays unrenderable is
    dropped and counted, or with `bad_records: error` stops the run.
    """

    name: TemplateName = "plain"
    variant: Literal["default", "no_system", "alpaca"] | None = None
    file: str | None = None
    file_text: str | None = None
    control_tokens: tuple[Annotated[str, Field(min_length=2)], ...] = ()
    train_on_prompt: bool = False
    train_role_header: bool = False
    system: str | None = None
    system_override: bool = False
    system_dropout: Fraction = 0.0
    seed: int = 42
    alternation: Literal["strict", "repair"] = "strict"
    bad_records: Literal["drop", "error"] = "drop"

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: Any) -> Any:
        """Read the file once: a run's recipe holds its text, as other machines lack the file."""
        if not isinstance(values, dict) or not isinstance(values.get("file"), str):
            return values
        if values.get("file_text") is not None:
            return values
        path = Path(values["file"]).expanduser()
        try:
            return {**values, "file_text": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"file {str(path)!r} cannot be read as UTF-8 text ({error})"
            ) from error

    @model_validator(mode="after")
    def _fits_together(self) -> "Template":
        if (self.name in ("few-shot", "file")) != (self.file_text is not None):
            raise ValueError("file belongs to the names few-shot and file, which need it")
        if self.variant is not None and self.name != "starchat":
            raise ValueError(f"variant belongs to the name starchat, not to {self.name!r}")
        for key in ("train_on_prompt", "train_role_header"):
            if self.is_jinja and getattr(self, key):
                raise ValueError(
                    f"{key}: a Jinja template says with generation blocks what is trained; "
                    "remove the key or set it to false"
                )
        if self.control_tokens and self.name not in ("file", "model"):
            raise ValueError(f"control_tokens: the template {self.name!r} has its own")
        return self

    @property
    def is_jinja(self) -> bool:
        """Return whether the template is Jinja: the model's own, or a file of that kind."""
        is_file = self.name == "file" and Path(self.file or "").suffix in JINJA_SUFFIXES
        return is_file or self.name == "model"
