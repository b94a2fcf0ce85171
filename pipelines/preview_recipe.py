"""What a recipe makes of a few records: `starloom preview RECIPE`, in seconds.

The recipe's own rendering stages run on the records, in a folder that is then removed, so what is
shown is what training gets. Filters, deduplication and redaction come before and are not applied.
"""

import socket
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.engine import Built, Job, Outcome, Params, Work
from pipelines.errors import StarloomError, TemplateError
from pipelines.funnel import funnel_text
from pipelines.manifest import Counts, Manifest
from pipelines.plan import Refs, build_stage, get_stage
from pipelines.recipe import Recipe, Tokenizer
from pipelines.records import Row, write_rows
from pipelines.render.encode import encode_prompt, load_tokenizer
from pipelines.render.reports import FENCE, show_audit, show_tokens
from pipelines.render.templates import Unrenderable, get_template
from pipelines.render.vocabulary import UnfetchedTokenizer
from pipelines.sources import check_sources
from pipelines.sources.preview import read_sample
from pipelines.store import StageRef, StageSpec, Store

NUM_SHOWN = 3
SAMPLE_RECORDS = 300
CURATED_RECORDS = 2000
CURATION = ("language", "quality", "redact", "dedup", "decontaminate")
# The vocabulary of a tokenizer that stands in for one of the Hub.
STAND_IN_TOKENS = 4096
# Longer examples and prompts are shown by their first and last lines.
SHOWN_LINES = 60


def sample_recipe(recipe: Recipe, *, limit: int = NUM_SHOWN) -> str:
    """Return the page on the first records of each of the recipe's sources.

    Raises PreflightError where one cannot be read here, SourceError where it is not fetched yet.
    """
    check_sources(recipe)
    records = [row for source in recipe.sources for row in read_sample(source, SAMPLE_RECORDS)]
    return preview_recipe(recipe, records, limit=limit)


def sample_rejected(recipe: Recipe) -> str:
    """Return what curation leaves out or changes of the first records of each source, and why.

    The real stages run on them, so deduplication compares these records only. Raises as
    `sample_recipe` does.
    """
    check_sources(recipe)
    records = [row for source in recipe.sources for row in read_sample(source, CURATED_RECORDS)]
    if not records:
        raise StarloomError("no record to preview: the recipe's sources gave none")
    with tempfile.TemporaryDirectory(prefix="starloom-preview-") as name:
        store = Store(Path(name), workers=1)
        refs: Refs = {"collect": _store_records(store, "collect", records)}
        for stage in CURATION:
            refs[stage] = build_stage(get_stage(stage), recipe, refs, store)
        manifests = {stage: store.manifest(refs[stage]) for stage in CURATION}
    return f"{len(records):,} records of {recipe.name}\n\n{funnel_text(manifests, {})}\n"


def preview_recipe(recipe: Recipe, records: Sequence[Row], *, limit: int = NUM_SHOWN) -> str:
    """Return a page on how a recipe renders records; all are counted, `limit` are shown.

    A tokenizer that the recipe trains is trained on these records here; so is one in the place of a
    tokenizer that cannot be fetched, unless its own chat template is wanted. Raises StarloomError
    where there is no record, and whatever the recipe's template or tokenizer lacks.
    """
    if not records:
        raise StarloomError("no record to preview: the recipe's sources gave none")
    with tempfile.TemporaryDirectory(prefix="starloom-preview-") as name:
        store = Store(Path(name), workers=1)
        refs: Refs = {"split": _store_records(store, "split", records)}
        wanted = recipe
        recipe, problem = _with_tokenizer(recipe, refs, store)
        for stage in ("format", "tokenize"):
            refs[stage] = build_stage(get_stage(stage), recipe, refs, store)
        parts = [_describe(wanted, store.manifest(refs["tokenizer"]), len(records))]
        if problem:
            parts.append(f"Shown with a tokenizer trained on these records: {problem}.")
        try:
            refs["pack"] = build_stage(get_stage("pack"), recipe, refs, store)
        except TemplateError as error:  # nothing is left: say why, below
            parts.append(f"{error}.")
        else:
            report = store.manifest(refs["pack"]).report
            parts += [show_tokens(report["token_report"]).rstrip()]
            audited = report["mask_audit"][:limit]
            parts.append('Examples; lines with "+" are trained on, the others are only read:')
            parts += [_shorten_text(show_audit([example]).rstrip()) for example in audited]
        manifests = [store.manifest(refs[stage]) for stage in ("format", "tokenize")]
        parts.append(_describe_drops(manifests, limit))
        parts.append(_describe_prompt(recipe, records, store.path(refs["tokenizer"])))
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_tokenizer(recipe: Recipe, refs: Refs, store: Store) -> tuple[Recipe, str]:
    """Build the tokenizer; return the recipe as it is shown, and why with another tokenizer."""
    problem = ""
    if _is_out_of_reach(recipe):
        problem = "the recipe's is not on this machine, and the Hub cannot be reached"
    else:
        try:
            refs["tokenizer"] = build_stage(get_stage("tokenizer"), recipe, refs, store)
        except UnfetchedTokenizer as error:
            problem = str(error)
    if problem:
        changes: dict[str, Any] = {"tokenizer": Tokenizer(train_vocab_size=STAND_IN_TOKENS)}
        if recipe.template.name == "model":
            problem += ", so its own template is shown as chatml"
            template = {"name": "chatml", "control_tokens": ()}
            changes["template"] = recipe.template.model_copy(update=template)
        recipe = recipe.model_copy(update=changes)
        refs["tokenizer"] = build_stage(get_stage("tokenizer"), recipe, refs, store)
    return recipe, problem


def _is_out_of_reach(recipe: Recipe) -> bool:
    """Return whether the tokenizer is on the Hub alone, which has no address from here.

    Asking for it would be tried again for half a minute.
    """
    name = recipe.tokenizer.name_or_path or recipe.model.model_name_or_path
    if recipe.tokenizer.train_vocab_size or not name or Path(name).expanduser().exists():
        return False
    from huggingface_hub import constants, try_to_load_from_cache

    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        return False
    revision = recipe.model.revision if name == recipe.model.model_name_or_path else None
    cached = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    if isinstance(cached, str) or urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _store_records(store: Store, stage: str, records: Sequence[Row]) -> StageRef:
    """Put the records where a stage would leave them; after split, all are to train on."""

    def write(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
        write_rows(output, records)
        return Outcome(Counts(len(records), len(records), len(records)))

    def build(work: Work) -> Built:
        split = "train" if stage == "split" else ""
        return Built((work.one(write, Job("records-00000.parquet", (), split), {}),))

    return store.build(StageSpec(stage, {}, ""), build)


def _describe(recipe: Recipe, tokenizer: Manifest, num_records: int) -> str:
    settings, template = recipe.tokenization, recipe.template
    variant = f" ({template.variant})" if template.variant else ""
    origin = recipe.tokenizer.name_or_path or recipe.model.model_name_or_path
    if recipe.tokenizer.train_vocab_size:
        origin = "trained on these records, in a run on the whole train split"
    trained = "prompts and answers" if template.train_on_prompt else "answers"
    if template.train_role_header:
        trained += " with their headers"
    lines = [
        f"recipe     {recipe.name}: {recipe.description}",
        f"records    {num_records:,}, before filters and deduplication",
        f"template   {template.name}{variant}; trained: {trained}",
        f"tokenizer  {tokenizer.report['vocab_size']:,} tokens, {origin}",
        f"rows       {settings.block_size:,} tokens; of longer dialogues: {settings.truncation}",
    ]
    return "\n".join(lines)


def _describe_drops(manifests: Sequence[Manifest], limit: int) -> str:
    lines = []
    for manifest in manifests:
        for reason, samples in manifest.report.get("samples", {}).items():
            lines += [
                f"- {reason}: {sample['id']}: {sample['detail']}" for sample in samples[:limit]
            ]
    return "\n".join(["Left out, for example:", *lines]) if lines else ""


def _describe_prompt(recipe: Recipe, records: Sequence[Row], folder: Path) -> str:
    """Return the prompt of inference for the first record that has one."""
    template, tokenizer = get_template(recipe.template, folder), load_tokenizer(folder)
    for record in records:
        if record["text"] is not None:
            continue
        try:
            pieces = template.render_prompt(record)
        except Unrenderable:
            continue
        text = "".join(piece.text or piece.control or "" for piece in pieces)
        stops = " or ".join(map(repr, (template.stop, *template.stop_texts)))
        head = (
            f"The prompt of `{record['id']}` at inference, {len(encode_prompt(tokenizer, pieces))}"
        )
        return f"{head} tokens; the answer ends at {stops}:\n\n" + _shorten_text(
            f"{FENCE}\n{text}\n{FENCE}"
        )
    return ""


def _shorten_text(text: str) -> str:
    """Return a text without the lines in its middle where it is long."""
    lines = text.split("\n")
    left_out = len(lines) - SHOWN_LINES
    if left_out <= 1:
        return text
    half = SHOWN_LINES // 2
    return "\n".join([*lines[:half], f"  ... {left_out:,} lines ...", *lines[-half:]])
