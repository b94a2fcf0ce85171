"""The `starloom` command. `up`, `down` and `status` come from flows.operate by entry point."""

import json
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.errors import StarloomError, did_you_mean

if TYPE_CHECKING:
    from pipelines.runs import Run

REJECTED = 3


class Commands(click.Group):
    """A group that suggests the closest command and finds those of other packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order they were declared, then the loaded ones."""
        _load_commands(self)
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name, loading the entry points where it is not our own."""
        if cmd_name not in self.commands:
            _load_commands(self)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command; an unknown one is an error with a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"{error.message.rstrip('.')}{hint}", ctx) from None


def _load_commands(group: click.Group) -> None:
    for entry in metadata.entry_points(group="starloom.commands"):
        for command in entry.load():
            if command.name not in group.commands:
                group.add_command(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="starloom")
@click.option("-v", "--verbose", is_flag=True, help="Show what every step does.")
def starloom(verbose: bool) -> None:
    """From raw code and conversations to a fine-tuned, evaluated coding assistant."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipelines").setLevel(level)
    # Its notes, at import, on faster kernels that are not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@starloom.command()
@click.argument("recipe")
@click.option("--data", metavar="PATH", help="A local path instead of the recipe's source.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe key.")
@click.option("--smoke", is_flag=True, help="Seconds: a tiny random model and few records.")
@click.option("--force", is_flag=True, help="Train again; the finished run is set aside.")
@click.option("--publish", is_flag=True, help="Copy an accepted model to data/models.")
@click.option("--push", metavar="OWNER/NAME", help="Offer to push an accepted model to the Hub.")
@click.option("--dry-run", is_flag=True, help="Print the commands as a script; run nothing.")
@click.option("--prepare-only", is_flag=True, help="Prepare the data; print the run's paths.")
def run(
    recipe: str,
    data: str | None,
    overrides: tuple[str, ...],
    smoke: bool,
    force: bool,
    publish: bool,
    push: str | None,
    dry_run: bool,
    prepare_only: bool,
) -> None:
    """Run a recipe here, without a server.

    Data, training, evaluation, report: what is finished already is reused. Exit
    code 3: the model is not better than step 0 by the recipe's margin.
    """
    from pipelines.cluster_run import Again, run_otherwise
    from pipelines.evals.push import check_push
    from pipelines.local import finetune
    from pipelines.overrides import parse_override

    if push:
        check_push(push, os.environ)
    again = Again(recipe, data, overrides, smoke, force, publish, push)
    shown = run_otherwise(again, dry_run=dry_run, prepare_only=prepare_only)
    if shown is not None:
        click.echo(shown)
        return
    finished = finetune(
        recipe,
        data=data,
        overrides=dict(parse_override(text) for text in overrides),
        smoke=smoke,
        force=force,
        publish_model=publish,
    )
    path = finished.run.path
    click.echo(f"run     {finished.run.name}{' (finished before, reused)' * finished.reused}")
    click.echo(f"gate    {finished.verdict.reason}")
    for label, file in (("model", "model"), ("report", "report.md"), ("loss", "loss.png")):
        click.echo(f"{label:7} {path / file}")
    if finished.preferred:
        click.echo(f"prefer  {finished.preferred}")
    if finished.published:
        click.echo(f"publish {finished.published}")
    if push and finished.verdict.accepted:
        _push(finished.run, push, public=False, yes=False)
    if not finished.verdict.accepted:
        sys.exit(REJECTED)


@starloom.command()
@click.argument("run_name", metavar="RUN")
@click.argument("prompt")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: greedy."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--raw", is_flag=True, help="Send the text as it is, without the template.")
def generate(
    run_name: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, raw: bool
) -> None:
    """Complete a prompt with a run's model.

    RUN is a name, its beginning, a path, or `latest`.
    """
    from pipelines.plan import data_root
    from pipelines.runs import find_run
    from pipelines.serve.generate import generate as complete

    found = find_run(data_root() / "runs", run_name)
    text = complete(
        found, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, raw=raw
    )
    click.echo(text)


@starloom.command()
@click.argument("run_name", metavar="RUN")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. beta=0.2.")
def prefer(run_name: str, overrides: tuple[str, ...]) -> None:
    """Prefer the better of two answers (DPO).

    Trains a finished run further on pairs of its own records, as the recipe's section
    `preference` says. Commands take the result as RUN/preferred. Exit code 3: the
    better answers gained nothing on held-out pairs.
    """
    from pipelines.overrides import parse_override
    from pipelines.plan import data_root, open_store
    from pipelines.prefer import prefer as run_stage
    from pipelines.prefer import preference_settings, summary
    from pipelines.runs import find_run

    found = find_run(data_root() / "runs", run_name)
    changes = dict(parse_override(text) for text in overrides)
    result = run_stage(found, open_store(), preference_settings(found.recipe(), changes))
    click.echo(f"prefer  {summary(result)}")
    click.echo(f"model   {found.preferred().model}")
    if not result["accepted"]:
        sys.exit(REJECTED)


@starloom.command()
@click.argument("run_name", metavar="RUN")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository visible to everybody.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def push(run_name: str, repository: str, public: bool, yes: bool) -> None:
    """Push an accepted model to the Hub.

    Shows what would go and asks. The token is HF_TOKEN; a new repository is private.
    """
    from pipelines.evals.push import check_push
    from pipelines.plan import data_root
    from pipelines.runs import find_run

    check_push(repository, os.environ)
    _push(find_run(data_root() / "runs", run_name), repository, public=public, yes=yes)


def _push(found: "Run", repository: str, *, public: bool, yes: bool) -> None:
    from pipelines.evals.push import plan_push, plan_text, read_token
    from pipelines.evals.push import push as push_planned

    plan = plan_push(found, repository, private=not public)
    click.echo(plan_text(plan))
    if not yes and not click.confirm(f"Push these {len(plan.files)} files to {repository}?"):
        click.echo("nothing was pushed")
        return
    click.echo(f"pushed  {push_planned(found, plan, read_token(os.environ))}")


@starloom.command()
@click.argument("stage")
@click.option("--recipe", help="Compare the builds of this recipe only.")
def why(stage: str, recipe: str | None) -> None:
    """Say why a data stage was built again."""
    from pipelines.plan import STAGES, open_store
    from pipelines.why import explain_rebuild

    names = [each.name for each in STAGES]
    if stage not in names:
        hint = did_you_mean(stage, names)
        raise StarloomError(f"no stage {stage!r}{hint} (stages: {', '.join(names)})")
    for line in explain_rebuild(open_store(), stage, recipe):
        click.echo(line)


@starloom.command()
@click.argument("run_name", metavar="RUN")
@click.option("--records", is_flag=True, help="Every training record as JSON lines.")
def trace(run_name: str, records: bool) -> None:
    """Trace a model to records, urls and licenses."""
    from pipelines.lineage import build_lineage, records_of_run, trace_text
    from pipelines.plan import data_root, open_store
    from pipelines.runs import find_run

    found, store = find_run(data_root() / "runs", run_name), open_store()
    if records:
        for record in records_of_run(found, store):
            click.echo(json.dumps(record, ensure_ascii=False))
    else:
        click.echo(trace_text(build_lineage(found, store)))


@starloom.command()
@click.argument("recipe")
@click.option("--data", metavar="PATH", help="A local path instead of the recipe's source.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe key.")
@click.option("--smoke", is_flag=True, help="Check the smoke form of the recipe.")
def doctor(recipe: str, data: str | None, overrides: tuple[str, ...], smoke: bool) -> None:
    """Check what a recipe needs here: memory, time, access, data.

    Exit code 1: it cannot run here; what would is shown.
    """
    from pipelines.overrides import parse_override
    from pipelines.plan import data_root
    from pipelines.preflight.doctor import doctor as diagnose
    from pipelines.preflight.fitting import Asked

    changes: dict[str, Any] = dict(parse_override(text) for text in overrides)
    for line in diagnose(Asked(recipe, data, changes, smoke), data_root()):
        click.echo(line)


@starloom.command()
@click.argument("what", metavar="PATH|RECIPE")
@click.option("--limit", default=3, show_default=True, type=click.IntRange(1), help="Records.")
@click.option("--data", metavar="PATH", help="A local path instead of the recipe's source.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key.")
@click.option("--smoke", is_flag=True, help="Preview the smoke form of the recipe.")
@click.option("--rejected", is_flag=True, help="What curation leaves out of a recipe, and why.")
def preview(
    what: str,
    limit: int,
    data: str | None,
    settings: tuple[str, ...],
    smoke: bool,
    rejected: bool,
) -> None:
    """Show what would be read, or trained on.

    Of a file or folder: its type and columns, the first records, what is wrong with
    which rows, and the lines for a recipe (--set takes keys of the source). Of a
    recipe: examples as they are rendered, with what is trained marked.
    """
    from pipelines.overrides import parse_override
    from pipelines.preview_recipe import sample_recipe, sample_rejected
    from pipelines.recipe import is_recipe_name, load_recipe
    from pipelines.sources.preview import preview as show

    changes = dict(parse_override(text) for text in settings)
    if is_recipe_name(what):
        loaded = load_recipe(what, data=data, overrides=changes, smoke=smoke)
        shown = sample_rejected(loaded) if rejected else sample_recipe(loaded, limit=limit)
        click.echo(shown, nl=False)
    else:
        click.echo(show(what, limit=limit, settings=changes), nl=False)


@starloom.command("import-config")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--deepspeed", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its JSON."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the recipe.")
def import_config(file: Path, deepspeed: Path | None, output: Path | None) -> None:
    """Turn the YAML of another training script into a recipe.

    Says what was renamed, what has no meaning here, and what is in conflict.
    """
    from pipelines.importing.config import import_config as convert
    from pipelines.store import write_atomic

    if output is not None and not output.parent.is_dir():
        raise StarloomError(f"{output.parent}: no such folder; make it, or name another --output")
    text, lines = convert(file, deepspeed, output)
    for line in lines:
        click.echo(line, err=True)
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists():
        raise StarloomError(f"{output} exists: name another file with --output")
    write_atomic(output, text)
    click.echo(f"recipe   {output}")


@starloom.command()
@click.argument("source")
@click.option("--since", required=True, metavar="DAY", help="First day, e.g. 2024-01-01 (UTC).")
@click.option("--until", required=True, metavar="DAY", help="The day after the last.")
@click.option(
    "--window", default="month", show_default=True, type=click.Choice(["day", "week", "month"])
)
@click.option("--recipe", help="Take the source as this recipe has it.")
def backfill(source: str, since: str, until: str, window: str, recipe: str | None) -> None:
    """Fetch a source's past, window by window.

    What was fetched before is passed over, so the same command goes on after a stop.
    """
    from pipelines.sources.backfill import backfill as fetch_windows
    from pipelines.sources.backfill import find_sources, parse_date

    span = parse_date(since), parse_date(until)
    for found in find_sources(source, [recipe] if recipe else None):
        for each, fetched in fetch_windows(found, *span, step=window):
            what = "fetched before" if fetched is None else fetched.summary
            click.echo(f"{each.since:%Y-%m-%d} to {each.until:%Y-%m-%d}  {what}")


@starloom.command()
def follow() -> None:
    """Show trainings as they run (Ctrl-C ends it)."""
    from pipelines.follow import follow as progress
    from pipelines.plan import data_root

    for line in progress(data_root() / "runs"):
        click.echo(line)


@starloom.group()
def data() -> None:
    """Check and clean what is stored."""


@data.command()
def verify() -> None:
    """Hash every stored stage again and name the damaged ones."""
    from pipelines.errors import StoreError
    from pipelines.plan import open_store

    problems = open_store().verify()
    if problems:
        listed = "; ".join(f"{folder}: {problem}" for folder, problem in problems.items())
        raise StoreError(f"{len(problems)} damaged: {listed} (the next run builds them again)")
    click.echo("every stored stage matches its manifest")


def main() -> None:
    """Run the command line; what a user can cause ends in one line, not a traceback."""
    try:
        starloom(standalone_mode=False)
    except StarloomError as error:
        _fail(str(error), 1)
    except (PermissionError, NotADirectoryError) as error:
        _fail(f"{error.filename}: {error.strerror}; is STARLOOM_DATA a folder of yours?", 1)
    except click.exceptions.Abort:
        _fail("interrupted; run the same command again to go on", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


def _fail(text: str, code: int) -> None:
    click.echo(f"starloom: {text}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
