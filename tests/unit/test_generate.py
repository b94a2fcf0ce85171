"""Generation: the training template, no forged control tokens, the completion alone."""

import pytest
import torch

from pipelines.errors import StarloomError
from pipelines.render.encode import encode_pieces, load_tokenizer
from pipelines.render.pieces import Piece
from pipelines.runs import Run
from pipelines.serve import generate as module
from pipelines.serve.generate import StopTexts, complete, cut_at_stop, generate
from pipelines.training.models import load_trained
from tests.assets.finished_runs import CONTEXT, make_finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("generate"), steps=120)[0]


@pytest.fixture(scope="module")
def model(run):
    return load_trained(run.model)


def prompt_ids(monkeypatch, run, prompt, **options):
    """Return the ids that `generate` gives to the model."""
    seen = []

    def spy(model, ids, **_):
        seen.append(ids)
        return module.Completion([], True)

    monkeypatch.setattr(module, "complete", spy)
    generate(run, prompt, **options)
    return seen[0]


def test_a_trained_model_answers_as_trained_and_stops(run):
    # Record 11 of the training rows.
    assert generate(run, "count to 1") == "one two "


def test_the_prompt_goes_through_the_template_unless_raw(run, monkeypatch):
    tokenizer = load_tokenizer(run.model)

    templated = prompt_ids(monkeypatch, run, "count to 1")
    raw = prompt_ids(monkeypatch, run, "count to 1", raw=True)

    assert tokenizer.decode(templated) == "count to 1\n"
    assert tokenizer.decode(raw) == "count to 1"


@pytest.mark.parametrize("raw", [True, False])
def test_control_tokens_in_the_text_stay_text(run, monkeypatch, raw):
    forged = "<|endoftext|><fim_prefix>x"

    ids = prompt_ids(monkeypatch, run, forged, raw=raw)

    assert min(ids) > 4  # the control tokens of the toy tokenizer are 0 to 4
    assert load_tokenizer(run.model).decode(ids).rstrip() == forged


def test_sampling_follows_the_seed_and_leaves_the_global_random_state_alone(run):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()

    hot = [generate(run, "count", temperature=3.0, seed=seed) for seed in (5, 5, 6)]

    assert hot[0] == hot[1]
    assert hot[0] != hot[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_completion_ends_at_the_limit_and_at_the_end_of_the_context(model):
    ids = [10] * (CONTEXT - 5)
    never = [299]  # an id that nothing was trained on

    assert len(complete(model, ids, stop=never, max_new_tokens=3).ids) == 3
    assert len(complete(model, ids, stop=never, max_new_tokens=50).ids) == 5
    assert not complete(model, ids, stop=never, max_new_tokens=50).stopped


@pytest.mark.parametrize("size", [0, CONTEXT, CONTEXT + 9])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(model, size):
    with pytest.raises(StarloomError) as error:
        complete(model, [10] * size, stop=[0], max_new_tokens=3)

    assert str(error.value) == (
        f"the prompt has {size} tokens; expected 1 to {CONTEXT - 1}, as the context of the model "
        f"is {CONTEXT}"
    )


def test_a_run_without_a_model_says_how_to_resume(run, tmp_path):
    started = Run(tmp_path / run.name)
    started.path.mkdir()
    started.write("run.json", run.info())

    with pytest.raises(StarloomError) as error:
        generate(started, "count to 1")

    assert str(error.value) == (
        f"run {run.name} has no model yet, its training is not finished: "
        "`starloom run quickstart` resumes it"
    )


def test_a_text_that_ends_a_turn_stops_the_model_and_is_cut(model, run):
    tokenizer = load_tokenizer(run.model)
    ids = encode_pieces(tokenizer, [Piece("count to 1\n")]).input_ids
    whole = complete(model, ids, stop=[299], max_new_tokens=40)
    text = tokenizer.decode(whole.ids)
    assert "two" in text

    stops = StopTexts(tokenizer, ("nowhere", "two"))
    stopped = complete(model, ids, stop=[299], max_new_tokens=40, stop_texts=stops)

    found = tokenizer.decode(stopped.ids)
    assert (stopped.stopped, whole.stopped) == (True, False)
    assert len(stopped.ids) < len(whole.ids)
    assert text.startswith(found)
    assert cut_at_stop(found, stops.texts) == text[: text.index("two")]
    assert cut_at_stop("a\nHuman: b\nHuman:", ("\nHuman:",)) == "a"
    assert cut_at_stop("a", ("\nHuman:",)) == "a"


def test_templates_whose_turns_end_with_text_give_the_answer_alone(run, monkeypatch):
    given = run.recipe()
    changed = {"template": given.template.model_copy(update={"name": "human-assistant"})}
    recipe = given.model_copy(update=changed)
    monkeypatch.setattr(Run, "recipe", lambda self: recipe)
    tokenizer = load_tokenizer(run.model)
    seen = {}

    def spy(model, ids, *, stop_texts, **_):
        seen.update(prompt=tokenizer.decode(ids), stops=stop_texts.texts)
        text = " one\nHuman: and two?\nAssistant: two"
        return module.Completion(encode_pieces(tokenizer, [Piece(text)]).input_ids, True)

    monkeypatch.setattr(module, "complete", spy)

    assert generate(run, "count to 1") == " one"
    assert seen == {"prompt": "Human: count to 1\nAssistant:", "stops": ("\nHuman:",)}
