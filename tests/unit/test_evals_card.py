"""The model card: its numbers are the manifests', its licenses complete, its snippet runs."""

import contextlib
import io
import re

import pytest
import yaml

from pipelines.errors import StarloomError
from pipelines.evals.card import EXAMPLE_PROMPT, card_text, front_matter, write_card
from pipelines.evals.evaluate import evaluate_run
from pipelines.lineage import build_lineage
from pipelines.runs import Run
from pipelines.serve.generate import generate
from tests.assets.finished_runs import make_finished_run, make_recipe_of_pairs, make_records

STARCODER = {"model__config": None, "model__model_name_or_path": "bigcode/starcoderbase-1b"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run, store = make_finished_run(tmp_path_factory.mktemp("card"))
    evaluate_run(run, store)
    return run, store


def head(text):
    return yaml.safe_load(re.split(r"^---$", text, flags=re.MULTILINE)[1])


def rows_of(text, first):
    """Return the cells of each table row that begins with a given cell."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n")
        if re.match(rf"\| {first} +\|", line)
    ]


def with_licenses(lineage, **licenses):
    """Return the lineage with other licenses, {license: records}, for its source `kit`."""
    kit = lineage["sources"]["kit"]
    return {**lineage, "sources": {"kit": {**kit, "used": {**kit["used"], "licenses": licenses}}}}


def test_the_numbers_on_the_card_are_those_of_manifests_training_and_scorecard(evaluated):
    run, store = evaluated
    text = write_card(run, store).read_text()
    refs, scorecard = run.refs(), run.read("scorecard.json")

    for name, ref in refs.items():
        manifest = store.manifest(ref)
        counts = manifest.counts
        lost = counts.dropped | counts.quarantined
        assert rows_of(text, name)[0] == [
            name,
            *(str(n) for n in (counts.rows_in, counts.used, counts.rows_out)),
            ", ".join(f"{reason} {n}" for reason, n in lost.items()) or "-",
            manifest.digest[:12],
        ]
    for shard in store.manifest(refs["pack"]).shards:
        numbers = (shard.rows, shard.tokens, shard.trained_tokens)
        assert rows_of(text, shard.split)[-1] == [shard.split, *(str(n) for n in numbers)]
    assert rows_of(text, "kit") == [
        ["kit", "2.0", "3", "6", "6", "3", "0"],
        ["kit", "BSD-3-Clause", "6"],
    ]
    assert rows_of(text, "toy") == [
        ["toy", "1.0", "9", "18", "7", "4", "3"],
        ["toy", "BSD-3-Clause", "7"],
    ]
    assert rows_of(text, "step 0")[0][1] == f"{scorecard['step0']['loss']:.4f}"
    assert rows_of(text, "tokens seen") == [["tokens seen", "12,345"]]
    # 312 tokens in the training shards.
    passes = "passes over the training set"
    assert rows_of(text, passes) == [[passes, f"{12_345 / 312:.3f}"]]
    learning_rate = str(run.recipe().training.learning_rate)
    assert rows_of(text, "training.learning_rate") == [["training.learning_rate", learning_rate]]
    assert rows_of(text, "fill-in-the-middle rate")[0][1] == "0.5 of code files"
    assert f"> {scorecard['reason']}" in text
    assert "no more than 13 records" in text


def test_the_front_matter_names_the_one_license_of_all_records(evaluated):
    text = write_card(*evaluated).read_text()

    assert head(text) == {
        "license": "bsd-3-clause",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["starloom"],
    }


@pytest.mark.parametrize(
    ("licenses", "overrides", "expected"),
    [
        ({"MIT": 3}, {}, {"license": "mit"}),
        ({"CC-BY-SA-4.0": 3}, {}, {"license": "cc-by-sa-4.0"}),
        ({"Ours-1.0": 3}, {}, {"license": "other", "license_name": "Ours-1.0"}),
        (
            {"MIT": 3, "Apache-2.0": 1},
            {},
            {"license": "other", "license_name": "licenses-of-the-training-data"},
        ),
        (
            {"MIT": 3},
            STARCODER,
            {"license": "bigcode-openrail-m", "base_model": "bigcode/starcoderbase-1b"},
        ),
        (
            {"MIT": 3},
            {**STARCODER, "model__model_name_or_path": "someone/else"},
            {
                "license": "other",
                "license_name": "license-of-the-base-model",
                "base_model": "someone/else",
            },
        ),
    ],
)
def test_the_license_is_the_base_models_or_the_one_the_records_share(
    evaluated, licenses, overrides, expected
):
    recipe = make_recipe_of_pairs(**overrides)
    fields = head(front_matter(recipe, with_licenses(build_lineage(*evaluated), **licenses)))

    for name in ("library_name", "pipeline_tag", "tags"):
        del fields[name]
    assert fields == expected


def test_a_model_made_from_starcoder_passes_its_use_restrictions_on(evaluated):
    run, _ = evaluated
    files = (run.read("training.json"), run.read("scorecard.json"))
    lineage = build_lineage(*evaluated)

    assert "OpenRAIL" in card_text(make_recipe_of_pairs(**STARCODER), lineage, *files)
    assert "OpenRAIL" not in card_text(run.recipe(), lineage, *files)


def test_records_without_a_license_stop_the_card_and_are_counted_by_source(tmp_path):
    records = make_records(lambda i: None if i in (2, 20, 21, 12) else "MIT")  # 2 is left out
    run, store = make_finished_run(tmp_path, records=records)
    evaluate_run(run, store)

    with pytest.raises(StarloomError) as error:
        write_card(run, store)

    assert str(error.value) == (
        f"run {run.name}: no license is known for kit (2 records), toy (1 records); set `license` "
        "of that source in the recipe, or leave those records out"
    )
    assert not (run.path / "card.md").exists()


def test_a_run_that_is_not_evaluated_gets_no_card(evaluated, tmp_path):
    run, store = evaluated
    fresh = Run(tmp_path / run.name)
    fresh.path.mkdir()
    fresh.write("run.json", run.info())
    fresh.write("training.json", run.read("training.json"))

    with pytest.raises(StarloomError, match="is not evaluated yet: `starloom run quickstart`"):
        write_card(fresh, store)


def test_the_snippet_on_the_card_runs_and_says_what_generate_says(evaluated, monkeypatch):
    run, _ = evaluated
    text = write_card(*evaluated).read_text()
    snippet = text.split("```python\n")[1].split("\n```")[0]
    monkeypatch.chdir(run.model)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "card", "exec"), {})

    assert printed.getvalue() == f"{generate(run, EXAMPLE_PROMPT, max_new_tokens=64)}\n"


def test_the_snippet_of_a_chat_model_ends_at_its_end_of_turn(evaluated):
    run, _ = evaluated
    recipe = make_recipe_of_pairs(template={"name": "starchat"})
    files = (run.read("training.json"), run.read("scorecard.json"))

    text = card_text(recipe, build_lineage(*evaluated), *files)

    assert (
        "tokenizer('<|user|>\\nReturn the sum of two numbers.<|end|>\\n<|assistant|>\\n', " in text
    )
    assert "eos_token_id=tokenizer.convert_tokens_to_ids('<|end|>')" in text
