"""Which answers become records, how they are scored and paired, and under which license."""

import json

import pytest

from pipelines.errors import RecipeError
from pipelines.recipe import load_recipe
from pipelines.sources.stack_exchange.licensing import combined_license, license_at, license_of
from pipelines.sources.stack_exchange.selections import preference_score
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files
from tests.assets.stack_exchange_dump import answer, dump_source, posts_xml, question

# Question 1: answer 12 is accepted, 13 the best, 11 and 14 equal, 15 below 0.
SCORES = {11: 2, 12: 3, 13: 8, 14: 2, 15: -1}
LINES = [
    question(1, AcceptedAnswerId=12, Score=4),
    *[answer(id_, 1, Score=score) for id_, score in SCORES.items()],
    question(2, Score=0, Tags="|python|", CreationDate="2020-01-01T00:00:00.000"),
    answer(21, 2, Score=0),
    question(3, AcceptedAnswerId=999, CreationDate="2021-01-01T00:00:00.000"),
]


def select(tmp_path, **keys):
    """Return ids of the records and what was dropped."""
    folder = write_files(tmp_path / "dump", {"Posts.xml": posts_xml(*LINES)})
    recipe = curation_recipe(dump_source(folder, **keys))
    store, refs = run_stages(tmp_path / "store", recipe, until="collect")
    rows, counts = rows_of(store, refs["collect"]), store.manifest(refs["collect"]).counts
    counts.check("selection")
    assert counts.rows_in == len(LINES)
    return [row["id"].removeprefix("se:") for row in rows], counts.dropped, rows


SELECTIONS = {
    "accepted": ({}, ["12"], {"no_selected_answer": 1, "not_selected": 5, "unanswered": 1}),
    "best": ({"select": "best"}, ["13", "21"], {"not_selected": 4, "unanswered": 1}),
    "top-k": (
        {"select": "top-k", "top_k": 3},
        ["13", "12", "11", "21"],
        {"not_selected": 2, "unanswered": 1},
    ),
    "all": ({"select": "all"}, ["13", "12", "11", "14", "15", "21"], {"unanswered": 1}),
    "answers of 2 or more": (
        {"select": "all", "min_answer_score": 2},
        ["13", "12", "11", "14"],
        {"answer_score": 2, "no_selected_answer": 1, "unanswered": 1},
    ),
    "questions of 4 or more": (
        {"select": "best", "min_question_score": 4},
        ["13"],
        {"not_selected": 4, "question_score": 2, "unanswered": 1},
    ),
    "any of two tags": (
        {"select": "best", "tags": ["python", "julia"]},
        ["21"],
        {"other_tags": 7},
    ),
    "a span of days": (
        {"select": "best", "since": "2020-01-01", "until": "2021-01-01"},
        ["21"],
        {"before_since": 6, "from_until_on": 1},
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_keeps_what_it_says_and_counts_the_rest(tmp_path, name):
    keys, expected, dropped = SELECTIONS[name]

    found, lost, _ = select(tmp_path, **keys)

    assert found == expected
    assert lost == dropped


def test_pairs_hold_a_better_answer_and_a_worse_one_with_its_origin(tmp_path):
    found, lost, rows = select(tmp_path, select="all", pairs=True)

    # Preferences: 12 -> 3 (accepted), 13 -> 3, 11 and 14 -> 2, 15 -> -1; equal ones make no pair.
    assert found == ["13>11", "13>14", "13>15", "12>11", "12>14", "12>15", "11>15", "14>15"]
    assert lost == {"no_pair": 1, "no_selected_answer": 1, "unanswered": 1}
    assert rows[0]["completion"] == "Answer 13."
    assert json.loads(rows[0]["meta"])["rejected"] == {
        "id": 11,
        "text": "Answer 11.",
        "score": 2,
        "preference": 2,
        "url": "https://stats.stackexchange.com/a/11",
        "author_url": "https://stats.stackexchange.com/users/12",
        "license": "CC-BY-SA-4.0",
    }


def test_pairs_follow_the_selection_and_their_cap(tmp_path):
    found, lost, _ = select(tmp_path, pairs=True, max_pairs=2)

    assert found == ["12>11", "12>14"]
    assert lost == {"no_selected_answer": 1, "not_selected": 3, "unanswered": 1}


def test_scores_follow_the_formula_of_stack_exchange_preferences():
    plain = {-5: -1, -1: -1, 0: 0, 1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 10: 3, 11: 4, 100: 7, 1000: 10}

    assert {votes: preference_score(votes, False) for votes in plain} == plain
    assert {votes: preference_score(votes, True) for votes in plain} == {
        votes: score + (votes >= 0) for votes, score in plain.items()
    }


@pytest.mark.parametrize(
    ("time", "version"),
    [
        ("2011-04-07T23:59:59", "2.5"),
        ("2011-04-07T23:59:59.999", "2.5"),
        ("2011-04-08T00:00:00", "3.0"),
        ("2011-04-08T00:00:00Z", "3.0"),
        ("2011-04-08T00:00:01.000", "3.0"),
        ("2018-05-01T23:59:59.999", "3.0"),
        ("2018-05-02T00:00:00.000", "4.0"),
        ("2018-05-02T00:00:01Z", "4.0"),
    ],
)
@pytest.mark.parametrize("how", ["created", "edited", "edited before it was created"])
def test_the_license_changes_at_two_instants_for_creation_and_for_edits(time, version, how):
    created, edited = {
        "created": (time, None),
        "edited": ("2008-01-01T00:00:00.000", time),
        "edited before it was created": (time, "2008-01-01T00:00:00.000"),
    }[how]

    assert license_at(time) == f"CC-BY-SA-{version}"
    assert license_of(None, None, created, edited) == f"CC-BY-SA-{version}"
    assert license_of(None, "MIT", created, edited) == "MIT"
    assert license_of("CC BY-SA 3.0", "MIT", created, edited) == "CC-BY-SA-3.0"
    assert license_of(" Public domain ", None, created, edited) == "Public domain"


def test_a_text_made_of_two_posts_is_under_the_later_license():
    assert combined_license("CC-BY-SA-2.5", "CC-BY-SA-4.0") == "CC-BY-SA-4.0"
    assert combined_license("CC-BY-SA-3.0", "CC-BY-SA-2.5") == "CC-BY-SA-3.0"
    assert combined_license("MIT", "MIT") == "MIT"
    assert combined_license("CC-BY-SA-3.0", "MIT") == "CC-BY-SA-3.0 AND MIT"


def test_an_unknown_selection_is_an_error_that_names_the_choices(tmp_path):
    source = dump_source(tmp_path, select="bests", top_k=0, closed="drop")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {config: {}}\ntokenizer: {train_vocab_size: 512}\n"
        f"sources: [{json.dumps(source)}]\n"
    )

    with pytest.raises(RecipeError) as error:
        load_recipe(str(recipe))

    for words in ("sources.0", "select", "top_k", "closed"):
        assert words in str(error.value)
