"""Runs a whole recipe on this machine, without a server: the same plan that the flows execute."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evals.card import write_card
from pipelines.evals.launch import evaluate
from pipelines.evals.publish import publish
from pipelines.evals.scorecard import Verdict, verdict
from pipelines.plan import Refs, data_root, open_store, prepare
from pipelines.prefer import prefer, preference_settings, summary
from pipelines.preflight.checks import check, check_run
from pipelines.preflight.fitting import Asked
from pipelines.runs import Run, open_run
from pipelines.sources.fetch import fetch_missing
from pipelines.training.launch import launch
from pipelines.training.preference import check_trl
from pipelines.training.reload import check_saved, reload_summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run, whether its model is better than step 0, and where it was published.

    `preferred` is what came of the preference stage, where the recipe has one.
    """

    run: Run
    verdict: Verdict
    reused: bool
    published: Path | None = None
    preferred: str | None = None


def finetune(
    recipe_name: str,
    *,
    data: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
    force: bool = False,
    publish_model: bool = False,
) -> Finished:
    """Prepare, train, evaluate, gate, card. Whatever is finished already is reused."""
    asked = Asked(recipe_name, data, overrides or {}, smoke)
    recipe = asked.load()
    check(recipe, data_root(), train_here=True, asked=asked)
    if recipe.preference:
        check_trl()
    fetch_missing(recipe)
    store = open_store(recipe.name)
    refs: Refs = {}
    for ref in prepare(recipe, store):
        refs[ref.stage] = ref
        how = (
            f"cached, saved {ref.seconds:.1f} s" if ref.cached else f"built in {ref.seconds:.1f} s"
        )
        logger.info("%-10s %8d rows  %s", ref.stage, ref.rows, how)
    run = open_run(recipe, refs, data_root() / "runs", force=force)
    check_run(run, store)
    reused = run.trained
    logger.info("train      %s", "finished before, reused" if reused else run.path)
    result = launch(run, store, on_progress=_log_progress)
    logger.info("train      %d steps in %.0f s", result["global_step"], result["seconds"])
    logger.info("reload     %s", reload_summary(check_saved(run)))
    decision = verdict(evaluate(run, store))
    logger.info("gate       %s", decision.reason)
    write_card(run, store)
    preferred = None
    if recipe.preference:
        preferred = summary(prefer(run, store, preference_settings(recipe)))
        logger.info("prefer     %s", preferred)
    published = publish(run) if publish_model and decision.accepted else None
    return Finished(run, decision, reused, published, preferred)


def _log_progress(state: dict[str, Any]) -> None:
    logger.info(
        "train      step %d of %d  loss %.3f  %.0f tokens/s",
        *(state[key] for key in ("step", "max_steps", "loss", "tokens_per_second")),
    )
