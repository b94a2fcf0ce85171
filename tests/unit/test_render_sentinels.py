import pytest
from tokenizers import Tokenizer

from pipelines.errors import TemplateError
from pipelines.render.encode import encode_pieces
from pipelines.render.fim import Draw, Rules, render_text
from pipelines.render.sentinels import FORMS, find_sentinels
from pipelines.render.vocabulary import train_tokenizer
from tests.assets.rendering import CORPUS


def tokenizer_with(*names):
    """Return a small tokenizer with no control tokens but these."""
    trained = train_tokenizer(CORPUS, 400)
    tokenizer = Tokenizer.from_str(trained.to_str().replace("fim_", "other_"))
    tokenizer.add_special_tokens(list(names))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_each_family_is_known_by_its_sentinels_names(form):
    tokenizer = tokenizer_with(*FORMS[form])
    rules = Rules(1.0, sentinels=find_sentinels(tokenizer))

    ids = encode_pieces(tokenizer, render_text("one two", Draw("psm", 3, 5), rules=rules)).input_ids

    assert rules.sentinels == find_sentinels(tokenizer, form) == FORMS[form]
    special = [tokenizer.id_to_token(i) for i in ids if tokenizer.id_to_token(i) in FORMS[form]]
    prefix, middle, suffix, end = FORMS[form]
    assert special == [prefix, suffix, middle, end]


def test_a_tokenizer_without_sentinels_is_refused_with_what_is_known():
    with pytest.raises(TemplateError) as error:
        find_sentinels(tokenizer_with())

    assert str(error.value).startswith(
        "fill-in-the-middle needs sentinels, and this tokenizer has those of no known form "
        "(starcoder: <fim_prefix> <fim_middle> <fim_suffix>; "
    )
    assert str(error.value).endswith("; use a tokenizer that has them, or set fim.fim_rate: 0")


@pytest.mark.parametrize("form", ["auto", "qwen"])
def test_one_missing_sentinel_is_named(form):
    tokenizer = tokenizer_with("<|fim_prefix|>", "<|fim_suffix|>")

    with pytest.raises(TemplateError, match=r"has no '<\|fim_middle\|>', which .* form of qwen"):
        find_sentinels(tokenizer, form)


def test_a_form_that_is_named_is_not_replaced_by_another():
    with pytest.raises(
        TemplateError, match="has no '<fim-prefix>', '<fim-middle>', '<fim-suffix>'"
    ):
        find_sentinels(tokenizer_with(*FORMS["starcoder"]), "santacoder")
