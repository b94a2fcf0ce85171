"""The command line: one screen of help, errors in one line, names as the flows use them."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipelines import cli
from pipelines.errors import StarloomError
from pipelines.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def starloom(*arguments):
    return CliRunner().invoke(cli.starloom, arguments)


def test_help_fits_one_screen_and_lists_exactly_these_commands():
    shown = starloom("--help")

    assert len(shown.output.splitlines()) <= 30
    assert set(cli.starloom.list_commands(click.Context(cli.starloom))) == {
        "run", "generate", "prefer", "push", "why", "trace", "doctor", "preview",
        "import-config", "backfill", "follow",
        "data", "up", "down", "status", "new",
    }  # fmt: skip


def test_run_takes_the_same_names_as_the_finetune_flow():
    from flows.finetune import finetune

    options = [each.name for each in cli.run.params]

    # What only prints or prepares is for the shell; a flow has its own views of both.
    assert options[-2:] == ["dry_run", "prepare_only"]
    assert options[:-2] == ["recipe", "data", "overrides", "smoke", "force", "publish", "push"]
    assert list(inspect.signature(finetune.fn).parameters) == options[:-2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "quickstrt"], "unknown recipe 'quickstrt', did you mean 'quickstart'?"),
        (["run", "quickstart", "--set", "x"], "--set 'x': expected KEY=VALUE"),
        (["run", "quickstart", "--set", "fim.fimrate=1"], "fim.fimrate: unknown key, did you mean"),
        (["why", "tokenise"], "no stage 'tokenise', did you mean 'tokenize'?"),
        (["trace", "latest"], "no run 'latest'"),
        (["generate", "nothing", "x"], "no run 'nothing'"),
        (["doctor", "oasst"], "hardware 'zero3' needs 8 GPU(s)"),
        (["import-config", "nowhere.yaml"], "File 'nowhere.yaml' does not exist"),
        (["preview", "nowhere.jsonl"], "nowhere.jsonl: does not exist"),
        (
            ["backfill", "stack-exchang", "--since", "2024-01-01", "--until", "2024-02-01"],
            "no recipe uses a source 'stack-exchang', did you mean 'stack-exchange'?",
        ),
        (
            ["backfill", "stack-exchange", "--since", "May", "--until", "2024-02-01"],
            "date 'May': expected YEAR-MONTH-DAY",
        ),
        (["new", "My Code", "--from", "."], "recipe name 'My Code': expected small letters"),
        (["new", "mine", "--from", "./nowhere"], "--from './nowhere': no such file or folder"),
        (["run", "quickstart", "--data", "/nowhere/x"], "/nowhere/x"),
        (["push", "latest", "model"], "repository 'model': expected OWNER/NAME"),
        (["push", "latest", "me/model"], "a push needs a token with write access: set HF_TOKEN"),
        (["run", "quickstart", "--push", "a b"], "repository 'a b': expected OWNER/NAME"),
        (["prefer", "nothing"], "no run 'nothing'"),
        (["rum", "quickstart"], "No such command 'rum', did you mean 'run'?"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_without_a_traceback(
    arguments, text, monkeypatch, capfd
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["starloom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capfd.readouterr().err

    assert stopped.value.code in (1, 2)
    assert text in error
    assert "Traceback" not in error
    if stopped.value.code == 1:
        assert len(error.strip().splitlines()) == 1


def test_a_rejected_model_ends_with_exit_code_3(monkeypatch, tmp_path):
    from pipelines import local
    from pipelines.evals.scorecard import Verdict
    from pipelines.runs import Run

    finished = local.Finished(Run(tmp_path / "r-1"), Verdict(False, "rejected: worse"), False)
    monkeypatch.setattr(local, "finetune", lambda *arguments, **options: finished)

    shown = starloom("run", "quickstart")

    assert shown.exit_code == 3
    assert "rejected: worse" in shown.output


def test_a_bug_keeps_its_traceback(monkeypatch):
    from pipelines import local

    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(local, "finetune", broken)
    monkeypatch.setattr(sys, "argv", ["starloom", "run", "quickstart"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_verify_names_damaged_stages(data_root):
    from pipelines.engine import Built, Job, Outcome
    from pipelines.manifest import Counts
    from pipelines.plan import open_store
    from pipelines.store import StageSpec

    def write(inputs, output, params):
        output.write_text("x")
        return Outcome(Counts())

    store = open_store()
    ref = store.build(
        StageSpec("collect", {}, "c"), lambda work: Built((work.one(write, Job("a", ()), {}),))
    )
    assert starloom("data", "verify").output == "every stored stage matches its manifest\n"
    (store.path(ref) / "a").write_text("y")

    with pytest.raises(StarloomError, match="1 damaged: collect/.*a does not match its sha256"):
        CliRunner().invoke(cli.starloom, ["data", "verify"], catch_exceptions=False)


def test_the_installed_command_answers():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "starloom"), "--version"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.startswith("starloom, version 0.1.0")


def test_preview_of_a_recipe_shows_examples_with_what_is_trained(tmp_path):
    rows = [{"instruction": f"Add {n} and {n}.", "output": f"It is {2 * n}."} for n in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))

    shown = starloom("preview", "gpteacher", "--smoke", "--data", str(path), "--limit", "1")

    assert shown.exit_code == 0, shown.output
    assert "records    40, before filters and deduplication" in shown.output
    assert re.search(r"^  Add (\d+) and \1\.$", shown.output, re.MULTILINE)
    assert re.search(r"^\+ It is \d+\.<\|endoftext\|>$", shown.output, re.MULTILINE)


def test_the_config_of_another_script_becomes_a_recipe_that_loads(tmp_path):
    seed = ROOT / "tests" / "assets" / "starchat"
    config = next(seed.glob("*.y*ml"))
    out = tmp_path / "starchat.yaml"

    shown = starloom("import-config", str(config), "-o", str(out))
    again = starloom("import-config", str(config), "-o", str(out))

    assert shown.exit_code == 0, shown.output
    assert load_recipe(str(out)).template.name == "starchat"
    assert out.read_text().startswith("# Imported from config.yaml: read it, then `starloom run st")
    assert "exists: name another file" in str(again.exception)
    nowhere = starloom("import-config", str(config), "-o", str(tmp_path / "no" / "x.yaml"))
    assert "no: no such folder; make it" in str(nowhere.exception)


def test_preview_shows_what_curation_leaves_out_with_samples_per_reason(tmp_path):
    good = [
        {
            "instruction": f"Add the numbers {n} and {n}.",
            "output": f"{n} plus {n} makes {2 * n}, as anybody can count.",
        }
        for n in range(5)
    ]
    odd = [
        {"instruction": "Sag mir, wie spaet es heute ist, und warum.", "output": "Es ist zwoelf."},
        {"instruction": "Who wrote this text?", "output": "Ada, ada.lovelace@mail.org did it."},
        good[0],
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(good + odd))

    shown = starloom("preview", "gpteacher", "--smoke", "--data", str(path), "--rejected")

    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("8 records of gpteacher")
    assert "- language, language:de" in shown.output
    assert "- redact, redacted:email" in shown.output
    assert "- dedup, exact_duplicate" in shown.output
    assert "lovelace@mail" not in shown.output
