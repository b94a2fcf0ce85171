"""Pushes an accepted model to the Hugging Face Hub: first a plan to look at, then one commit.

What goes is the run's model folder with the card as README.md: no checkpoints, no data. The plan's
digest is over every byte of it, so that what is approved is what is pushed. The token comes from
whoever calls, and is in no plan, file, log or error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import PreflightError, StarloomError
from pipelines.evals.card import CARD
from pipelines.evals.publish import PUBLISHED_CARD, check_accepted
from pipelines.hub_access import hub_errors
from pipelines.manifest import digest_of, sha256_file
from pipelines.markdown import table
from pipelines.runs import PREFERRED, Run

TOKEN = "HF_TOKEN"  # noqa: S105 - the name of the variable
PUSHED = "pushed.json"
MB = 1e6
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
# Files of an earlier push that a loader would read beside the new ones.
WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What is pushed where. `files` are the sizes in bytes by the name in the repository."""

    run: str
    repository: str
    private: bool
    files: dict[str, int]
    license: str
    verdict: str
    card: str
    digest: str

    @property
    def size(self) -> int:
        """Return the size of all files in bytes."""
        return sum(self.files.values())


def plan_push(run: Run, repository: str, *, private: bool = True) -> PushPlan:
    """Return what a push of an accepted run would do; nothing leaves this machine.

    Raises StarloomError where the run may not be pushed (rejected, not evaluated in its present
    state, without a card), or the repository's name is none.
    """
    check_repository(repository)
    check_accepted(run)
    card, verdict = _card(run), str((run.read("scorecard.json") or {})["reason"])
    if run.weights == PREFERRED:
        verdict += f"; preference stage {_preferred(run)['reason']}"
    paths = _model_files(run)
    files = {name: path.stat().st_size for name, path in paths.items()}
    hashes = {name: sha256_file(path) for name, path in paths.items()}
    return PushPlan(
        run=run.name,
        repository=repository,
        private=private,
        files=dict(sorted({**files, PUBLISHED_CARD: len(card.encode())}.items())),
        license=_license(card),
        verdict=verdict,
        card=card,
        digest=digest_of([repository, private, hashes, card]),
    )


def push(run: Run, plan: PushPlan, token: str) -> str:
    """Push exactly what the plan says, in one commit, and return the commit's address.

    The repository is made where there is none; weights of an earlier push that are not in this one
    are removed. Raises StarloomError where the model is no longer that of the plan, or the Hub
    refuses.
    """
    from huggingface_hub import HfApi

    if plan_push(run, plan.repository, private=plan.private).digest != plan.digest:
        raise StarloomError(
            f"run {run.name} is no longer what was approved for {plan.repository}; plan it again"
        )
    try:
        address = _commit(HfApi(token=token), run, plan)
    except hub_errors() as error:
        raise StarloomError(
            f"the Hub did not take {run.name} as {plan.repository} ({_explain(error, token)}); "
            f"the Hub has to be reached, HF_HUB_OFFLINE unset, and the token needs write access to "
            f"{plan.repository.split('/')[0]!r}"
        ) from None  # the cause may show the request
    run.write(
        PUSHED, {"repository": plan.repository, "commit": address, "model": run.weights,
                 "private": plan.private, "digest": plan.digest},
    )  # fmt: skip
    return address


def _commit(api: Any, run: Run, plan: PushPlan) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(plan.repository, repo_type="model", private=plan.private, exist_ok=True)
    present = api.list_repo_files(plan.repository, repo_type="model")
    left_over = [name for name in present if name.endswith(WEIGHTS) and name not in plan.files]
    paths = _model_files(run)
    added = [
        CommitOperationAdd(name, plan.card.encode() if name == PUBLISHED_CARD else paths[name])
        for name in plan.files
    ]
    done = api.create_commit(
        plan.repository,
        operations=[*added, *(CommitOperationDelete(name) for name in left_over)],
        commit_message=f"Model of run {plan.run}",
        repo_type="model",
    )
    return str(done.commit_url)


def plan_text(plan: PushPlan) -> str:
    """Return the plan as Markdown, with the card."""
    facts: list[list[object]] = [
        ["repository", plan.repository],
        ["visible to", "its owners only" if plan.private else "everybody"],
        ["license", plan.license],
        ["gate", plan.verdict],
        ["files", f"{len(plan.files)}, {plan.size / MB:,.1f} MB"],
    ]
    rows: list[list[object]] = [[name, size / MB] for name, size in plan.files.items()]
    shown = plan.card.split("---\n", 2)[-1].strip()
    return "\n\n".join(
        [table(["what", "value"], facts), table(["file", "MB"], rows), "## The card", shown]
    )


def check_push(repository: str, environment: Mapping[str, str]) -> None:
    """Raise what a push would fail with at once: no repository's name, or no token."""
    check_repository(repository)
    read_token(environment)


def read_token(environment: Mapping[str, str]) -> str:
    """Return the token of the Hub from the environment; PreflightError where there is none."""
    token = environment.get(TOKEN, "").strip()
    if not token:
        raise PreflightError(
            f"a push needs a token with write access: set {TOKEN} "
            "(https://huggingface.co/settings/tokens)"
        )
    return token


def check_repository(name: str) -> None:
    """Raise StarloomError where a name is no repository of the Hub."""
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name:
        raise StarloomError(f"repository {name!r}: expected OWNER/NAME, e.g. my-org/my-model")


def _model_files(run: Run) -> dict[str, Path]:
    """Return the files of the model by their name in the repository, the card excepted."""
    found = {}
    for path in sorted(run.model.rglob("*")):
        name = str(path.relative_to(run.model))
        if path.is_symlink():
            raise StarloomError(f"{path}: a link in a model folder is not pushed; remove it")
        if path.is_file() and name != PUBLISHED_CARD:
            found[name] = path
    return found


def _preferred(run: Run) -> dict[str, Any]:
    result = run.read(f"{PREFERRED}.json") or {}
    if not result.get("accepted"):
        reason = result.get("reason", "there is none")
        raise StarloomError(f"run {run.name} is not pushed: preference stage: {reason}")
    return result


def _card(run: Run) -> str:
    text = (run.path / CARD).read_text(encoding="utf-8")
    if run.weights != PREFERRED:
        return text
    result = _preferred(run)
    facts = {"held-out pairs": result["held_out"]["pairs"], **result["settings"]}
    rows = [[name, str(value)] for name, value in facts.items()]
    return (
        f"{text}\n## Preference stage\n\nThis is the model after direct preference optimisation on "
        f"{result['pairs']:,} pairs of the training data; the losses above are those before it.\n\n"
        f"> {result['reason']}\n\n{table(['what', 'value'], rows)}\n"
    )


def _license(card: str) -> str:
    head = yaml.safe_load(card.split("---\n", 2)[1]) if card.startswith("---\n") else {}
    found = head.get("license") or "none"
    return f"{found} ({head['license_name']})" if head.get("license_name") else str(found)


def _explain(error: Exception, token: str) -> str:
    """Return an error's kind and first line, without the token."""
    lines = [line.strip() for line in str(error).replace(token, "***").split("\n") if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
