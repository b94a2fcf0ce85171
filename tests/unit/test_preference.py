"""Pairs of answers: rendered as in fine-tuning, and preferred after training."""

import json

import pytest
import torch

from pipelines.errors import PreflightError, TrainingError
from pipelines.render.encode import encode_pieces
from pipelines.render.pairs import encode_pairs
from pipelines.render.templates import get_template
from pipelines.template_settings import Template
from pipelines.training import preference
from pipelines.training.models import load_trained
from pipelines.training.preference import Preference, train_preferences
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
    with pytest.raises(PreflightError, match=r"install 'starloom\[trl\]'"):
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


def test_a_runs_own_records_are_its_pairs_and_held_out_ones_are_not(tmp_path):
    from pipelines.prefer import prefer_answers, read_pairs

    body = {"prompt": "Why?", "completion": "Because."}
    train = [record(f"r{i}", **body, meta=meta(f"No idea {i}.")) for i in range(4)]
    files = [record("file", text="x = 1\n"), record("alone", **body)]
    held_out = [record("test", **body, meta=meta("Never seen."))]
    run, store = finished_run(tmp_path, {"train": [*train, *files], "test": held_out})

    pairs, dropped = read_pairs(run, store)
    assert [pair.record_id for pair in pairs] == ["r0", "r1", "r2", "r3"]
    assert dropped == {"no_pair": 1, "too_long": 0}

    pytest.importorskip("trl", reason="the extra trl is not installed")
    result = prefer_answers(run, store, Preference(max_steps=2, gradient_accumulation_steps=1))

    assert (result["pairs"], result["max_steps"]) == (4, 2)
    assert run.read("preferred.json") == json.loads(json.dumps(result))
    assert load_trained(run.path / "preferred").config.n_embd == 32
    assert (run.path / "preferred" / "adapter" / "adapter_model.safetensors").exists()
    assert not list(run.path.glob("preferred.tmp-*"))


def test_a_run_that_is_not_trained_prefers_nothing(tmp_path):
    from pipelines.prefer import prefer_answers

    run, store = finished_run(tmp_path, {"train": [record("a", prompt="x", completion="y")]})
    (run.path / "training.json").unlink()
    with pytest.raises(TrainingError, match="is not trained to its end yet"):
        prefer_answers(run, store, Preference())
