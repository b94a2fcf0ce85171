import json
import os
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from pipelines.errors import PreflightError, TemplateError
from pipelines.plan import get_stage, stage_spec
from pipelines.render import vocabulary
from pipelines.render.templates import get_template
from pipelines.render.vocabulary import STARCODER_TOKENS, train_tokenizer
from pipelines.store import Store
from tests.assets.rendering import (
    CORPUS,
    read_stream,
    record,
    render_stages,
    rendering_recipe,
    store_split,
)

RECORDS = {"train": [record(f"r:{i}", text=text) for i, text in enumerate(CORPUS)]}


def with_own_template(path, **overrides):
    return given(path, template__name="model", template__train_on_prompt=False, **overrides)


def given(path, **overrides):
    return rendering_recipe(
        tokenizer__train_vocab_size=None, tokenizer__name_or_path=str(path), **overrides
    )


def save_tokenizer(folder, *, without=()):
    """Write a folder with a tokenizer.json that lacks some of StarCoder's tokens."""
    data = json.loads(train_tokenizer(CORPUS, 400).to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in without]
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {
        f"<gone{index}>" if token in without else token: index for token, index in vocab.items()
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_the_trained_tokenizer_has_starcoders_control_tokens_and_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    store, refs = render_stages(tmp_path, rendering_recipe(), RECORDS, until="tokenizer")
    folder = store.path(refs["tokenizer"])
    loaded = AutoTokenizer.from_pretrained(folder)

    assert loaded.convert_tokens_to_ids(list(STARCODER_TOKENS)) == list(range(19))
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 4, 512)
    text = "x = 2026  # caf\u00e9 \U0001f600\n\n\treturn x\r\n"
    ids = loaded(text)["input_ids"]
    assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert loaded.decode(ids) == text


def test_numbers_are_single_digits_however_often_they_occur():
    tokenizer = train_tokenizer(["year = 2026\n" * 50], 400)

    assert tokenizer.encode("year = 2026").tokens == ["year", "\u0120=", "\u0120", *"2026"]


def test_a_model_config_beside_it_does_not_change_the_loaded_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    store, refs = render_stages(tmp_path, rendering_recipe(), RECORDS, until="tokenizer")
    model = shutil.copytree(store.path(refs["tokenizer"]), tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "gpt_bigcode"}')

    assert AutoTokenizer.from_pretrained(model)("12345")["input_ids"] == [
        Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(digit) for digit in "12345"
    ]


def test_chat_tokens_are_added_in_the_order_of_the_blog_post(tmp_path):
    recipe = rendering_recipe(template__name="starchat")

    store, refs = render_stages(tmp_path, recipe, RECORDS, until="tokenizer")
    report = store.manifest(refs["tokenizer"]).report

    assert (report["vocab_size"], report["trained"]) == (516, True)
    assert report["control_ids"] == {
        "<|endoftext|>": 0, "<fim_pad>": 4, "<fim_prefix>": 1, "<fim_middle>": 2,
        "<fim_suffix>": 3, "<|system|>": 512, "<|assistant|>": 513, "<|user|>": 514, "<|end|>": 515,
    }  # fmt: skip


def test_training_gives_the_same_bytes_whatever_the_number_of_threads(tmp_path):
    code = (
        "from pipelines.render import vocabulary\n"
        "from tests.assets.rendering import CORPUS\n"
        "import hashlib\n"
        "text = vocabulary.train_tokenizer(CORPUS * 3, 700).to_str()\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    }

    assert len(digests) == 1


def test_a_given_tokenizer_keeps_its_ids_and_gets_the_chat_tokens_behind_them(tmp_path):
    folder = save_tokenizer(tmp_path / "given")
    recipe = given(folder, template__name="starchat")

    store, refs = render_stages(tmp_path / "store", recipe, RECORDS, until="tokenizer")
    before = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    after = Tokenizer.from_file(str(store.path(refs["tokenizer"]) / "tokenizer.json")).get_vocab()

    chat = {"<|system|>": 400, "<|assistant|>": 401, "<|user|>": 402, "<|end|>": 403}
    assert after == {**before, **chat}
    assert store.manifest(refs["tokenizer"]).report["trained"] is False


def test_a_tokenizer_of_another_family_gets_an_end_and_a_pad_token_of_its_own(tmp_path):
    folder = save_tokenizer(tmp_path / "given", without=("<|endoftext|>", "<fim_pad>"))
    recipe = given(folder, fim__fim_rate=0)

    store, refs = render_stages(tmp_path / "store", recipe, RECORDS, until="tokenizer")

    before = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    made = Tokenizer.from_file(str(store.path(refs["tokenizer"]) / "tokenizer.json"))
    assert made.get_vocab() == {**before, "<|endoftext|>": 400, "<fim_pad>": 401}
    assert store.manifest(refs["tokenizer"]).report["control_ids"]["<fim_pad>"] == 401


def test_a_pad_token_of_another_family_is_used_and_no_row_is_added(tmp_path):
    folder = save_tokenizer(tmp_path / "given", without=("<fim_pad>",))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<filename>", "<|fim_pad|>"))

    store, refs = render_stages(
        tmp_path / "store", given(folder, fim__fim_rate=0), RECORDS, until="tokenizer"
    )

    report = store.manifest(refs["tokenizer"]).report
    config = json.loads((store.path(refs["tokenizer"]) / "tokenizer_config.json").read_text())
    assert (report["vocab_size"], report["control_ids"]) == (
        400,
        {"<|endoftext|>": 0, "<|fim_pad|>": 5},
    )
    assert config["pad_token"] == "<|fim_pad|>"


def test_a_models_template_begins_and_ends_with_the_tokens_that_its_tokenizer_names(tmp_path):
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path / "given")
    config = {
        "bos_token": "<gh_stars>",
        "eos_token": {"content": "<issue_closed>"},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{{ 'assistant\n' if add_generation_prompt }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    store, refs = render_stages(
        tmp_path / "store", with_own_template(folder), RECORDS, until="tokenizer"
    )
    made = store.path(refs["tokenizer"])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    written = json.loads((made / "tokenizer_config.json").read_text())

    assert AutoTokenizer.from_pretrained(made).apply_chat_template(messages, tokenize=False) == (
        "<gh_stars>user\nHiassistant\nHello<issue_closed>"
    )
    assert (written["end_of_answer"], written["end_of_text"]) == (
        "<issue_closed>",
        "<|endoftext|>",
    )


def test_a_given_tokenizer_counts_by_its_content_and_not_by_its_path(tmp_path):
    folder = save_tokenizer(tmp_path / "given")
    moved = shutil.copytree(folder, tmp_path / "moved")
    changed = save_tokenizer(tmp_path / "changed", without=("<reponame>",))
    params = [vocabulary.params(given(path)) for path in (folder, moved, changed)]

    assert params[0] == params[1] != params[2]
    assert str(tmp_path) not in repr(params)


def test_a_tokenizer_without_the_sentinels_is_refused_with_the_remedy(tmp_path):
    folder = save_tokenizer(tmp_path / "given", without=("<fim_middle>",))

    with pytest.raises(TemplateError) as error:
        render_stages(tmp_path / "store", given(folder), RECORDS, until="tokenizer")
    assert str(error.value) == (
        "the tokenizer has no '<fim_middle>', which fill-in-the-middle in the form of starcoder "
        "renders; add it to the tokenizer as a special token, or set fim.fim_rate: 0"
    )

    recipe = given(folder, fim__fim_rate=0)
    _, refs = render_stages(tmp_path / "store", recipe, RECORDS, until="tokenizer")
    assert refs["tokenizer"].stage == "tokenizer"


def test_the_tokenizer_carries_the_chat_template_of_the_recipe(tmp_path):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    recipe = rendering_recipe(template__name="starchat", template__system="Be kind.")

    store, refs = render_stages(tmp_path, recipe, RECORDS, until="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(store.path(refs["tokenizer"]))

    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    )


OWN = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + m['content'] + '<|endoftext|>' }}{% endfor %}"
)
OWN += "{% if add_generation_prompt %}{{ '<turn>assistant' }}{% endif %}"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_models_own_chat_template_is_kept_and_used(tmp_path, where):
    folder = save_tokenizer(tmp_path / "given")
    text = OWN if where.endswith("jinja") else json.dumps({"chat_template": OWN})
    (folder / where).write_text(text)
    recipe = with_own_template(folder, template__control_tokens=["<turn>"])
    pair = record("p", prompt="Hi", completion="Hello")

    store, refs = render_stages(
        tmp_path / "store", recipe, {"train": [*RECORDS["train"], pair]}, until="format"
    )
    made = store.path(refs["tokenizer"])
    config = json.loads((made / "tokenizer_config.json").read_text())
    ((_, path),) = store.shards(refs["format"], "train")
    (row,) = (row for row in read_stream(path) if row["record_id"] == "p")
    spec = vocabulary.params(recipe)

    assert config["chat_template"] == OWN
    assert store.manifest(refs["tokenizer"]).report["control_ids"]["<turn>"] == 400
    assert [piece["text"] or piece["control"] for piece in row["pieces"]] == [
        "<turn>", "user", "Hi", "<|endoftext|>", "<turn>", "assistant", "Hello", "<|endoftext|>",
    ]  # fmt: skip
    assert [piece["trained"] for piece in row["pieces"]] == [False] * 6 + [True] * 2
    assert (spec["chat_template"], str(tmp_path) in repr(spec)) == (OWN, False)


@pytest.mark.parametrize("name", ["file", "model"])
def test_what_ends_an_answer_of_a_jinja_template_is_told_to_training(tmp_path, name):
    folder = save_tokenizer(tmp_path / "given")
    source = OWN.replace("<|endoftext|>", "</turn>")
    (folder / "chat_template.jinja").write_text(source)
    recipe = given(
        folder,
        template__name=name,
        template__train_on_prompt=False,
        template__control_tokens=["<turn>", "</turn>"],
        **({"template__file": str(folder / "chat_template.jinja")} if name == "file" else {}),
    )

    store, refs = render_stages(tmp_path / "store", recipe, RECORDS, until="tokenizer")

    made = store.path(refs["tokenizer"])
    config = json.loads((made / "tokenizer_config.json").read_text())
    assert (config["end_of_answer"], config["chat_template"]) == ("</turn>", source)
    assert get_template(recipe.template, made).stop == "</turn>"


def test_a_template_of_a_model_that_has_none_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path / "given")

    with pytest.raises(TemplateError, match="has no chat template; name one"):
        vocabulary.params(with_own_template(folder))
    with pytest.raises(TemplateError, match="a tokenizer that is trained here has no chat"):
        vocabulary.params(rendering_recipe(template__name="model", template__train_on_prompt=False))


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(PreflightError, match=r"no tokenizer.json there; write it with"):
        vocabulary.params(given(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/x", "starcoder", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_sent_to_the_hub(tmp_path, name):
    with pytest.raises(PreflightError, match="no such folder, and not a Hub id"):
        render_stages(tmp_path, given(name), RECORDS, until="tokenizer")


def test_a_gated_tokenizer_names_the_license_page_and_the_login(tmp_path):
    recipe = rendering_recipe(
        tokenizer__train_vocab_size=None,
        model__config=None,
        model__model_name_or_path="bigcode/starcoderbase-1b",
        model__revision="abc123",
    )

    with pytest.raises(PreflightError) as error:
        render_stages(tmp_path, recipe, RECORDS, until="tokenizer")

    assert "'bigcode/starcoderbase-1b' at revision 'abc123' cannot be fetched" in str(error.value)
    assert "accept its license at https://huggingface.co/bigcode/starcoderbase-1b" in str(
        error.value
    )
    spec = stage_spec(
        get_stage("tokenizer"), recipe, {"split": store_split(Store(tmp_path), RECORDS)}
    )
    assert (spec.params["name_or_path"], spec.params["revision"]) == (
        "bigcode/starcoderbase-1b",
        "abc123",
    )


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_models_chat_template_is_fetched_with_its_tokenizer(tmp_path, monkeypatch, where):
    from huggingface_hub.errors import EntryNotFoundError

    hub = save_tokenizer(tmp_path / "hub")
    (hub / where).write_text(OWN if where.endswith("jinja") else json.dumps({"chat_template": OWN}))
    fetched = []

    def download(name, file, *, revision):
        fetched.append((name, file, revision))
        if not (hub / file).exists():
            raise EntryNotFoundError(file)
        return str(hub / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    recipe = with_own_template("owner/chat", template__control_tokens=["<turn>"])

    store, refs = render_stages(tmp_path / "store", recipe, RECORDS, until="tokenizer")

    config = json.loads((store.path(refs["tokenizer"]) / "tokenizer_config.json").read_text())
    assert config["chat_template"] == OWN
    files = [file for _, file, _ in fetched]
    assert files == [
        "tokenizer_config.json",
        *([where] * where.endswith("jinja")),
        "tokenizer.json",
        "tokenizer_config.json",
    ]
