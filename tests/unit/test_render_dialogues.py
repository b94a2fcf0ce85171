"""Which turns of a dialogue are rendered: the system turn, repaired orders, refusals."""

import pytest

from pipelines.errors import RecipeError, TemplateError
from pipelines.recipe import load_recipe
from pipelines.render.dialogues import DialogueRules, Unrenderable
from pipelines.render.templates import get_template
from pipelines.settings.template import Template as Settings
from tests.assets.rendering import read_stream, record, render_stages, rendering_recipe
from tests.assets.template_cases import ALL, chat, text_of


def turns_of(record, **rules):
    return [(t["role"], t["content"]) for t in DialogueRules(**rules).turns(record)]


QUESTION = (("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("own", "system", "override", "found"),
    [
        (None, None, False, None),
        (None, "S", False, "S"),
        ("own", "S", False, "own"),
        ("own", "S", True, "S"),
        ("own", "", True, ""),
        ("own", None, True, None),
    ],
)
def test_the_system_turn_is_the_dialogues_own_unless_overridden(own, system, override, found):
    dialogue = chat(*([("system", own)] if own else []), *QUESTION)

    turns = turns_of(dialogue, system=system, system_override=override)

    assert turns == [*([("system", found)] if found is not None else []), *QUESTION]


def test_a_share_of_dialogues_is_trained_without_a_system_turn_drawn_by_record_and_seed():
    def dropped(seed):
        rules = DialogueRules("S", system_dropout=0.3, seed=seed)
        return {
            i
            for i in range(1000)
            if rules.training_turns(chat(*QUESTION, record_id=f"r:{i}"))[0]["role"] == "user"
        }

    first, again, other = dropped(1), dropped(1), dropped(2)

    assert first == again != other
    assert abs(len(first) - 300) < 3 * (1000 * 0.3 * 0.7) ** 0.5
    rules = DialogueRules("S", system_dropout=1.0)
    assert rules.prompt_turns(chat(*QUESTION))[0]["role"] == "system"


def test_held_out_dialogues_keep_their_system_turn(tmp_path):
    recipe = rendering_recipe(
        template__name="starchat", template__system="S", template__system_dropout=1.0,
        template__train_on_prompt=False, fim__fim_rate=0,
    )  # fmt: skip
    row = record("d", messages=chat(*QUESTION)["messages"])

    store, refs = render_stages(tmp_path, recipe, {"train": [row], "test": [row]}, until="format")

    first = {
        shard.split: read_stream(path)[0]["pieces"][0]["control"]
        for shard, path in store.shards(refs["format"])
    }
    assert first == {"train": "<|user|>", "test": "<|system|>"}


@pytest.mark.parametrize(
    ("turns", "repaired"),
    [
        ((("user", "a"), ("user", "b")), (("user", "a\n\nb"),)),
        ((("assistant", "x"), ("user", "a")), (("user", "a"),)),
        (
            (("system", "s"), ("system", "t"), ("assistant", "x"), ("user", "a")),
            (("system", "s\n\nt"), ("user", "a")),
        ),
        (
            (("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")),
            (("user", "a\n\nb"), ("assistant", "c")),
        ),
    ],
)
def test_repair_joins_neighbours_and_leaves_out_empty_turns_and_answers_to_nothing(turns, repaired):
    assert tuple(turns_of(chat(*turns), alternation="repair")) == repaired


def test_a_joined_answer_is_trained_only_if_both_parts_are():
    dialogue = chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    dialogue["messages"][2]["train"] = False
    template = get_template(Settings(name="starchat", alternation="repair"))

    pieces = template.render(dialogue)

    assert text_of(pieces).endswith("<|assistant|>\nb\n\nc<|end|>\n")
    assert not any(piece.trained for piece in pieces)
    assert dialogue["messages"][1]["content"] == "b"


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ((("user", "a"), ("tool", "b")), "unknown_role"),
        ((("user", "a"), ("system", "b"), ("user", "c")), "bad_alternation"),
        ((("user", " "), ("assistant", "b")), "no_messages"),
    ],
)
def test_what_cannot_be_repaired_is_refused(turns, why):
    with pytest.raises(Unrenderable) as error:
        turns_of(chat(*turns), alternation="repair")
    assert error.value.why == why


def test_bad_records_are_dropped_and_counted_or_stop_the_run(tmp_path):
    rows = [
        record("good", messages=chat(*QUESTION)["messages"]),
        record("bad", messages=chat(("assistant", "b"))["messages"]),
    ]
    given = {"template__name": "starchat", "template__train_on_prompt": False}

    store, refs = render_stages(
        tmp_path / "a", rendering_recipe(**given), {"train": rows}, until="format"
    )
    assert store.manifest(refs["format"]).counts.dropped == {"template:bad_alternation": 1}

    for policy in ("drop", "split-windows"):
        strict = rendering_recipe(
            **given, template__bad_records="error", tokenization__truncation=policy
        )
        with pytest.raises(TemplateError) as error:
            render_stages(tmp_path / policy, strict, {"train": rows}, until="format")
        assert str(error.value) == (
            "record 'bad': message 0 has role 'assistant', expected 'user'; template.alternation: "
            "repair mends what it can (template.bad_records: drop leaves such records out and "
            "counts them)"
        )


@pytest.mark.parametrize("name", ["few-shot", "sc2-instruct"])
def test_a_template_without_a_system_turn_takes_such_dialogues_when_told_to(name):
    dialogue = chat(("system", "S"), *QUESTION)
    settings = ALL[name]

    with pytest.raises(Unrenderable) as error:
        get_template(settings).render(dialogue)
    override = settings.model_copy(update={"system_override": True})
    pieces = get_template(override).render(dialogue)

    assert error.value.why in ("no_system_turn", "not_a_pair")
    assert pieces == get_template(settings).render(chat(*QUESTION))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"name": "chatm"}, "template.name: Input should be"),
        ({"name": "few-shot"}, "file belongs to the names few-shot and file, which need it"),
        ({"name": "plain", "file": "FILE"}, "file belongs to the names few-shot and file"),
        ({"name": "file", "file": "no.yaml"}, "no.yaml' cannot be read as UTF-8 text"),
        ({"name": "chatml", "variant": "alpaca"}, "variant belongs to the name starchat"),
        ({"name": "chatml", "control_tokens": ["<a>"]}, "the template 'chatml' has its own"),
        ({"name": "starchat", "system_dropout": 2}, "template.system_dropout"),
    ],
)
def test_a_recipe_with_keys_that_do_not_fit_is_refused(tmp_path, keys, problem):
    file = tmp_path / "prompt.txt"
    file.write_text("Human: Hi")
    given = {f"template.{k}": str(file) if v == "FILE" else v for k, v in keys.items()}

    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", overrides=given)

    assert problem in str(error.value)


def test_a_templates_file_is_read_once_and_its_path_is_no_part_of_a_key(tmp_path):
    from pipelines.render import format as stage

    found = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "prompt.txt"
        path.parent.mkdir()
        path.write_text("Human: Hi\n\nAssistant: Hello")
        recipe = rendering_recipe(template__name="few-shot", template__file=str(path))
        path.unlink()
        again = type(recipe).model_validate(recipe.model_dump())
        assert get_template(again.template).render_prompt({"prompt": "q"}) == get_template(
            recipe.template
        ).render_prompt({"prompt": "q"})
        found.append(stage.params(recipe))

    assert found[0] == found[1]
    assert str(tmp_path) not in repr(found)
