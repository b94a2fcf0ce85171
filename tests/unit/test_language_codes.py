"""Codes of languages as people write them become the model's labels."""

import pytest

from pipelines.curate.language_model import find_model, load_model
from pipelines.errors import RecipeError
from pipelines.language_codes import LABELS, SCRIPTS, language_label, scripts_of
from pipelines.recipe import load_recipe


@pytest.mark.parametrize(
    ("code", "label"),
    [
        ("en", "en"), ("EN", "en"), ("uk-UA", "uk"), ("zh-CN", "zh"), ("zh_TW", "zh"),
        ("pt-BR", "pt"), ("eng", "en"), ("nb-NO", "no"), ("iw", "he"), (" de ", "de"),
    ],
)  # fmt: skip
def test_regions_scripts_and_older_codes_name_the_same_language(code, label):
    assert language_label(code) == label


def test_the_known_labels_are_those_of_the_model():
    labels = load_model(find_model()).getLabels("strict")[0]

    assert {label.removeprefix("__label__") for label in labels} == LABELS
    assert set(SCRIPTS) <= LABELS
    assert scripts_of("ja") == {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}
    assert scripts_of("fr") == {"LATIN"}


def test_a_recipe_keeps_labels_once_and_names_a_language_nobody_knows():
    recipe = load_recipe("quickstart", overrides={"curation.languages": ["en-GB", "en", "uk-UA"]})

    assert recipe.curation.languages == ("en", "uk")
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides={"curation.languages": ["english"]})
    assert str(caught.value) == (
        "recipe quickstart: curation.languages: no such language 'english'; use ISO 639-1 codes "
        "as en, uk or zh, got ['english']"
    )
