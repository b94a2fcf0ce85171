"""Instruction, dialogue and text rows from files or a hub dataset."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.settings.section import Count, Section
from pipelines.settings.sources.every import EverySource, RepositoryName

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# What a preset type is fetched from where its source names no other place, pinned. Their answers
# were written by models of OpenAI.
PRESETS: dict[str, dict[str, Any]] = {
    "code-alpaca": {
        "dataset": "HuggingFaceH4/CodeAlpaca_20K",
        "revision": "798c567f69c8f4b12fc191015e59ee34e9afe00d",
        "expected_rows": 20_022,
    },
    "gpteacher": {
        "repository": "teknium1/GPTeacher",
        "revision": "481075123c29854bddb82655badeef6a438f2436",
        "files": ["Codegen/codegen-instruct.json"],
        "sha256": {
            "Codegen/codegen-instruct.json": (
                "8b0be81f22b86bccab30f573351b62efb3391da229d2ee817a65ce0abb08b29d"
            )
        },
        "expected_rows": 4535,
    },
}
PLACE = ("dataset", "repository", "revision")


class Columns(Section):
    """Which column of a row holds what; what is not named is found by its usual names.

    A row's body is `messages`, or `prompt` (with `input`, `system`) and `completion`, or `text`.
    `id` and `group` (what must not cross a split) default to the row, `url`, `author`, `license`,
    `created`, `score` and `split` to what the source says. A dot reaches into a nested column:
    `metadata.answer_score`.
    """

    messages: str | None = None
    prompt: str | None = None
    input: str | None = None
    completion: str | None = None
    system: str | None = None
    text: str | None = None
    id: str | None = None
    group: str | None = None
    url: str | None = None
    author: str | None = None
    license: str | None = None
    created: str | None = None
    score: str | None = None
    split: str | None = None


class DatasetSource(EverySource):
    """Rows of JSON, JSON lines, CSV, Parquet or Arrow; their schema is detected file by file.

    They come from a local `path` (file or folder), a hub `dataset` (OWNER/NAME), or `files` of a
    GitHub `repository` (OWNER/NAME); the latter two at a pinned `revision`, a commit. `files` and
    `exclude` are globs over paths. `sha256` maps downloaded files to what they must hash to.
    `columns` names columns that are not detected. `splits` selects of the splits that file names,
    folders or rows bring. `roles: merge` joins turns of one role that follow each other, which
    `strict` quarantines. `expected_rows` fails the run where the files hold another number of
    rows. `input_separator` stands between an instruction and its input in a prompt; the default
    is what the alpaca template looks for, a blank line reads better in the others.
    `code-alpaca` and `gpteacher` are presets: a place, its revision and rows, and
    `openai_outputs: true`.
    """

    FETCHES: ClassVar[tuple[str, ...]] = ("dataset", "repository", "revision", "files")

    type: Literal["dataset", "code-alpaca", "gpteacher"]
    dataset: str | None = None
    repository: RepositoryName | None = None
    files: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    columns: Columns = Columns()
    splits: tuple[Literal["train", "validation", "test"], ...] = ()
    roles: Literal["strict", "merge"] = "strict"
    expected_rows: Count | None = None
    input_separator: str = "\n\n### Input:\n"

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        """Fill in what a preset knows; its rows and hashes only of the very files it means."""
        preset = PRESETS.get(values.get("type", "")) if isinstance(values, dict) else None
        if preset is None:
            return values
        filled = {"openai_outputs": True, **values}
        named = {key: values[key] for key in ("dataset", "repository") if values.get(key)}
        if values.get("path") is not None or any(preset.get(k) != v for k, v in named.items()):
            return filled
        other = any(values.get(key) for key in ("files", "splits"))
        if other or values.get("revision", preset["revision"]) != preset["revision"]:
            preset = {key: preset[key] for key in PLACE if key in preset}
        return {**preset, **filled}
