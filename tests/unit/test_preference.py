"""Pairs of answers: rendered as in fine-tuning, and preferred after training."""

import json

import pytest
import torch

from pipelines import prefer
from pipelines.errors import PreflightError, RecipeError, StarloomError, TrainingError
from pipelines.jsonlines import read_lines
from pipelines.recipe import load_recipe
from pipelines.render.encode import encode_pieces
from pipelines.render.pairs import encode_pairs
from pipelines.render.templates import get_template
from pipelines.runs import find_run
from pipelines.settings.preference import Preference
from pipelines.settings.template import Template
from pipelines.training import preference
from pipelines.training.models import load_trained
from pipelines.training.preference import (
    answer_log_probs,
    compare_answers,
    train_preferences,
)
from tests.assets.rendering import record, small_tokenizer
from tests.assets.tiny_models import write_base_model


def meta(text):
    return json.dumps({"rejected": {"text": text, "score": 0}})


def dialogue(answer):
    turns = [("user", "Why?", False), ("assistant", answer, True)]
    return [{"role": role, "content": text, "train": train} for role, text, train in turns]


@pytest.mark.parametrize("name", ["question-answer", "alpaca", "starchat"])
def test_a_pair_is_one_prompt_and_both_answers_as_the_template_renders_them(name):
    tokenizer, template = small_tokenizer(), get_template(Template(name=name))
    body = {"prompt": "Why?", "completion": "Because."}
    rows = [record("a", **body, meta=meta("No idea."))]
    if name == "starchat":
        rows.append(record("b", messages=dialogue("Because."), meta=meta("No idea.")))

    pairs, dropped = encode_pairs(tokenizer, template, rows, 512)

    assert dropped == {"no_pair": 0, "too_long": 0}
    worse = {**rows[0], "completion": "No idea."}
    for pair in pairs:
        better = encode_pieces(tokenizer, template.render(rows[0])).input_ids
        assert pair.prompt_ids + pair.chosen_ids == better
        rendered = encode_pieces(tokenizer, template.render(worse)).input_ids
        assert pair.prompt_ids + pair.rejected_ids == rendered
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1]  # the end of a turn is learned
        assert tokenizer.decode(pair.chosen_ids).strip() == "Because."
    assert [pair.record_id for pair in pairs] == [row["id"] for row in rows]


def test_a_dialogue_has_a_pair_for_each_answer_that_others_were_ranked_below():
    tokenizer, template = small_tokenizer(), get_template(Template(name="starchat"))
    messages = [*dialogue("Because."), *dialogue("So.")]
    worse = [
        {"turn": 1, "text": "No."},
        {"turn": 3, "text": "Hm key-1"},
        {"turn": 3, "text": "So."},
    ]
    row = record("a", messages=messages, meta=json.dumps({"rejected": worse}))

    pairs, dropped = encode_pairs(
        tokenizer, template, [row], 512, lambda text: text.replace("key-1", "<KEY>")
    )

    assert dropped == {"no_pair": 0, "too_long": 0}
    shown = [
        [tokenizer.decode(ids, skip_special_tokens=False) for ids in pair[1:]] for pair in pairs
    ]
    first, second = shown
    assert first[1:] == ["Because.<|end|>\n", "No.<|end|>\n"]
    assert second[0] == f"{first[0]}{first[1]}<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    assert second[1:] == ["So.<|end|>\n", "Hm <KEY><|end|>\n"]


def test_pairs_that_the_template_refuses_are_counted_by_its_reason():
    body = [{"role": "assistant", "content": "Hello", "train": True}]
    row = record("a", messages=body, meta=meta("Bye"))

    pairs, dropped = encode_pairs(
        small_tokenizer(), get_template(Template(name="starchat")), [row], 512
    )

    assert (pairs, dropped) == ([], {"no_pair": 0, "too_long": 0, "no_messages": 1})


def test_rows_without_a_worse_answer_and_texts_that_are_too_long_are_counted():
    body = {"prompt": "Why?", "completion": "Because."}
    rows = [
        record("none", **body),
        record("same", **body, meta=meta("Because.")),
        record("long", **body, meta=meta("No idea. " * 50)),
        record("pair", **body, meta=meta("No idea.")),
    ]
    pairs, dropped = encode_pairs(small_tokenizer(), get_template(Template()), rows, 64)

    assert [pair.record_id for pair in pairs] == ["pair"]
    assert dropped == {"no_pair": 2, "too_long": 1}


def test_without_trl_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(preference, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=r"`pip install -e .\[trl\]`"):
        train_preferences(tmp_path, {"prompt_ids": []}, tmp_path, Preference())


def test_the_better_answer_gains_on_the_worse_one(tmp_path):
    pytest.importorskip("trl", reason="the extra trl is not installed")
    base = write_base_model(tmp_path / "base", "gpt_bigcode")
    pairs = {
        "prompt_ids": [[5, 6, 7 + i] for i in range(8)],
        "chosen_ids": [[20, 21, 0]] * 8,
        "rejected_ids": [[30, 31, 32, 0]] * 8,
    }
    settings = Preference(
        learning_rate=1e-2, max_steps=8, gradient_accumulation_steps=1, warmup_steps=0
    )

    result = train_preferences(base, pairs, tmp_path / "out", settings)

    assert result["accuracy"] == 1.0
    assert result["margin"] > 0
    assert result["loss"] < 0.6931

    def margin(folder):
        model = load_trained(folder)
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
        return float(logits[20] - logits[30])

    assert margin(tmp_path / "out") > margin(base)
    with pytest.raises(TrainingError, match="no preference pairs"):
        train_preferences(base, {name: [] for name in pairs}, tmp_path / "none", settings)


def finished_run(tmp_path, splits):
    """Return a run whose model is trained, with records of its own, and its store."""
    from pipelines.store import ref_to_dict
    from pipelines.training.models import build_model, save_trained
    from tests.assets.rendering import rendering_recipe, store_split
    from tests.assets.training_runs import make_run

    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<fim_pad>"}
    write |= dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(write))
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
    recipe = rendering_recipe(
        model__config=shape, tokenization__block_size=128, template__name="question-answer"
    )
    run, store = make_run(tmp_path, recipe)
    info = run.info()
    info["stages"]["split"] = ref_to_dict(store_split(store, splits))
    run.write("run.json", info)
    save_trained(build_model(recipe, tmp_path), run.model, tmp_path, "float32")
    run.write("training.json", {"status": "finished", "model_files": {}})
    return run, store


BODY = {"prompt": "Why?", "completion": "Because."}
RELOADED = {"ids": [1], "stop_ids": [0]}
HELD_OUT = {
    "pairs": 1, "accuracy_before": 0.0, "accuracy_after": 1.0, "reward_accuracy": 1.0,
    "reward_margin": 0.5,
}  # fmt: skip


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run with four pairs to train on and one that is held out; nothing is reloaded."""
    train = [record(f"r{i}", **BODY, meta=meta(f"No idea {i}.")) for i in range(4)]
    files = [record("file", text="x = 1\n"), record("alone", **BODY)]
    held_out = [record("test", **BODY, meta=meta("Never seen."))]
    monkeypatch.setattr(prefer, "reload_folder", lambda run, folder: RELOADED)
    return finished_run(tmp_path, {"train": [*train, *files], "test": held_out})


def test_a_runs_own_records_are_its_pairs_and_held_out_ones_are_not(finished):
    run, store = finished
    pairs, dropped = prefer.read_pairs(run, store)
    assert [pair.record_id for pair in pairs] == ["r0", "r1", "r2", "r3"]
    assert dropped == {"no_pair": 1, "too_long": 0}
    assert [pair.record_id for pair in prefer.read_pairs(run, store, "test")[0]] == ["test"]

    pytest.importorskip("trl", reason="the extra trl is not installed")
    settings = Preference(max_steps=2, gradient_accumulation_steps=1, learning_rate=1e-2)
    result = prefer.prefer_answers(run, store, settings)

    assert (result["pairs"], result["steps"], result["held_out"]["pairs"]) == (4, 2, 1)
    assert run.read("preferred.json") == json.loads(json.dumps(result))
    assert load_trained(run.path / "preferred").config.n_embd == 32
    assert (run.path / "preferred" / "adapter" / "adapter_model.safetensors").exists()
    assert not list(run.path.glob("preferred.tmp-*"))
    steps = read_lines(run.path / "prefer.jsonl")
    assert [line["step"] for line in steps if "rewards/margins" in line] == [1, 2]


def fake_training(monkeypatch, held_out=HELD_OUT, fails=False):
    """Train nothing: leave a model of one file; the list has the columns that were given."""
    seen = []

    def train(model, pairs, output, settings, dtype, *, held_out, log):
        seen.append((pairs, held_out))
        output.mkdir()
        (output / "model.safetensors").write_text(f"beta {settings.beta}")
        if fails:
            raise TrainingError("stopped")
        return {"loss": 0.5, "held_out": HELD_OUT if result is None else result}

    result = held_out
    monkeypatch.setattr(prefer, "train_preferences", train)
    monkeypatch.setattr(prefer, "check_trl", lambda: None)
    monkeypatch.setattr(prefer, "_prefer_separately", prefer.prefer_answers)
    return seen


def test_the_preferred_model_lies_beside_the_trained_one_and_is_made_once(finished, monkeypatch):
    run, store = finished
    seen = fake_training(monkeypatch)

    first = prefer.prefer(run, store, Preference())
    again = prefer.prefer(run, store, Preference())
    other = prefer.prefer(run, store, Preference(beta=0.3))

    assert len(seen) == 2
    assert (first["accepted"], first["pairs"], first["reload"]) == (True, 4, RELOADED)
    assert first == again
    assert first["key"] != other["key"] == run.read("preferred.json")["key"]
    assert (run.path / "preferred" / "model.safetensors").read_text() == "beta 0.3"
    assert first["reason"] == (
        "accepted: held-out preference accuracy 0.000 -> 1.000, the better answer gained in 100.0% "
        "of 1 pairs"
    )
    found = find_run(run.path.parent, f"{run.name}/preferred")
    assert (found.name, found.model) == (f"{run.name}/preferred", run.path / "preferred")
    assert find_run(run.path.parent, str(run.path / "preferred")) == found
    assert find_run(run.path.parent, run.name).model == run.model


def test_a_stage_that_ends_early_leaves_what_was_there_before(finished, monkeypatch):
    run, store = finished
    with pytest.raises(StarloomError, match=f"run {run.name} has no preferred model: `starloom"):
        find_run(run.path.parent, f"{run.name}/preferred")
    fake_training(monkeypatch)
    before = prefer.prefer(run, store, Preference())
    fake_training(monkeypatch, fails=True)

    with pytest.raises(TrainingError, match="stopped"):
        prefer.prefer(run, store, Preference(beta=0.3))
    (run.path / "preferred.tmp-1").mkdir()

    assert run.read("preferred.json") == before
    assert run.preferred().trained
    (run.path / "preferred" / "model.safetensors").write_text("cut")
    assert not run.preferred().trained


def test_what_is_not_measured_or_got_worse_is_not_accepted(finished, monkeypatch):
    run, store = finished
    fake_training(monkeypatch, {**HELD_OUT, "reward_accuracy": 0.5})
    assert prefer.prefer(run, store, Preference())["reason"].startswith("rejected: held-out")

    result = prefer._decide(None)
    assert (result["accepted"], "no pair is held out" in result["reason"]) == (False, True)


def test_held_out_pairs_are_compared_by_what_each_answer_gained():
    before, after = [(-4.0, -3.0), (-2.0, -5.0)], [(-3.0, -4.0), (-2.5, -4.0)]

    assert compare_answers(before, after, 0.5) == {
        "pairs": 2, "accuracy_before": 0.5, "accuracy_after": 1.0, "reward_accuracy": 0.5,
        "reward_margin": (0.5 * 2 + 0.5 * -1.5) / 2,
    }  # fmt: skip
    assert compare_answers([], [], 0.5) is None


def test_the_log_probability_is_that_of_the_answers_tokens_alone(tmp_path):
    model = load_trained(write_base_model(tmp_path, "gpt_bigcode"))
    pairs = {"prompt_ids": [[5, 6]], "chosen_ids": [[7, 8]], "rejected_ids": [[9]]}

    [(chosen, rejected)] = answer_log_probs(model, pairs)

    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    assert chosen == pytest.approx(float(logits[1, 7] + logits[2, 8]), abs=1e-5)
    assert rejected == pytest.approx(float(logits[1, 9]), abs=1e-5)


def test_settings_come_from_the_recipe_and_changes_are_checked():
    pairs = {"sources.0.pairs": True, "preference.beta": 0.2}
    recipe = load_recipe("stack-exchange", overrides=pairs)

    settings = prefer.preference_settings(recipe, {"adapter.r": 16})

    assert (settings.beta, settings.adapter.r) == (0.2, 16)
    assert prefer.preference_settings(load_recipe("quickstart")) == Preference()
    with pytest.raises(RecipeError, match="preference: bta: unknown key, did you mean 'beta'?"):
        prefer.preference_settings(recipe, {"bta": 1})
    with pytest.raises(RecipeError, match="preference: no source makes pairs; set `pairs: true`"):
        load_recipe("quickstart", overrides={"preference.beta": 0.2})
    smoke = load_recipe("stack-exchange", overrides={"sources.0.pairs": True}, smoke=True)
    assert smoke.preference is None
    with pytest.raises(RecipeError, match="beta: .*greater than 0, got -1"):
        prefer.preference_settings(recipe, {"beta": -1})


def test_a_run_that_is_not_trained_prefers_nothing(tmp_path):
    run, store = finished_run(tmp_path, {"train": [record("a", prompt="x", completion="y")]})
    (run.path / "training.json").unlink()
    with pytest.raises(TrainingError, match="is not trained to its end yet"):
        prefer.prefer(run, store, Preference())


def test_preferences_take_one_of_the_gpus_that_are_seen(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    assert trl.DPOConfig  # imported before a GPU is said to be there

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    arguments = preference._arguments(Preference(), tmp_path, "bfloat16")

    assert (str(arguments.device), arguments.n_gpu) == ("cuda:0", 1)
