"""Fill-in-the-middle loses nothing, keeps its rates and depends on the record alone."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.render.encode import encode_pieces
from pipelines.render.fim import Draw, Rules, draw_fim, permute_tokens, render_text, restore_text
from pipelines.render.pieces import Piece
from pipelines.render.sentinels import FORMS
from tests.assets.rendering import small_tokenizer

RULES = st.builds(
    Rules,
    rate=st.just(1.0),
    spm_variant=st.sampled_from([1, 2]),
    train_sentinels=st.booleans(),
    sentinels=st.sampled_from(list(FORMS.values())),
)


@st.composite
def cuts(draw):
    text = draw(st.text(max_size=60))
    start, stop = sorted(draw(st.integers(0, len(text))) for _ in range(2))
    return text, Draw(draw(st.sampled_from(["none", "psm", "spm"])), start, stop)


@settings(deadline=None)
@given(cuts(), st.booleans(), RULES)
def test_the_text_comes_back_from_the_pieces(cut, ends, rules):
    text, draw = cut
    permuted = draw.order != "none"
    end = rules.sentinels.end if permuted else "<|endoftext|>"

    pieces = render_text(text, draw, ends=ends, rules=rules)

    assert restore_text(pieces, rules.sentinels) == text
    assert all(piece.trained for piece in pieces if piece.text or piece.control == end)
    sentinels = [piece for piece in pieces if piece.control in rules.sentinels[:3]]
    assert sorted(p.control for p in sentinels) == sorted(rules.sentinels[:3] * permuted)
    assert {piece.trained for piece in sentinels} <= {rules.train_sentinels}
    assert (pieces[-1:] == [Piece(control=end, trained=True)]) == (ends or permuted)


@settings(deadline=None)
@given(
    st.lists(st.integers(10, 99), max_size=30),
    st.sampled_from(["psm", "spm"]),
    st.sampled_from([1, 2]),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_tokens_come_back_from_cuts_between_them(tokens, order, variant, cuts):
    draw = Draw(order, 0, 0, tuple(sorted(cuts)))

    runs = permute_tokens(tokens, draw, (1, 2, 3), spm_variant=variant)

    parts, current = {0: [], 1: [], 2: [], 3: []}, 0
    for run, is_content in runs:
        current = current if is_content else run[0]
        parts[current] += run if is_content else ()
    assert parts[0] + parts[1] + parts[2] + parts[3] == tokens
    assert sorted(run[0] for run, is_content in runs if not is_content) == [1, 2, 3]


@settings(deadline=None)
@given(cuts())
def test_the_text_comes_back_from_the_token_ids(cut):
    text, draw = cut
    tokenizer = small_tokenizer()
    ids = encode_pieces(tokenizer, render_text(text, draw)).input_ids

    pieces, run = [], []
    for i in [*ids, None]:
        if i is not None and i > 3:
            run.append(i)
            continue
        pieces += [Piece(tokenizer.decode(run))] if run else []
        run = []
        pieces += [Piece(control=tokenizer.id_to_token(i))] if i is not None else []

    assert restore_text(pieces) == text


def test_the_orders_are_those_of_starcoder_and_of_the_paper():
    text = "head middle tail"

    psm = render_text(text, Draw("psm", 5, 11))
    spm = render_text(text, Draw("spm", 5, 11))
    first = render_text(text, Draw("spm", 5, 11), rules=Rules(1.0, spm_variant=1))

    assert [piece.text or piece.control for piece in first] == [
        "<fim_suffix>", " tail", "<fim_prefix>", "head ", "<fim_middle>", "middle", "<|endoftext|>",
    ]  # fmt: skip

    assert [piece.text or piece.control for piece in psm] == [
        "<fim_prefix>", "head ", "<fim_suffix>", " tail", "<fim_middle>", "middle", "<|endoftext|>",
    ]  # fmt: skip
    assert [piece.text or piece.control for piece in spm] == [
        "<fim_prefix>", "<fim_suffix>", " tail", "<fim_middle>", "head ", "middle", "<|endoftext|>",
    ]  # fmt: skip


def test_deepseek_marks_the_hole_where_the_suffix_begins():
    rules = Rules(1.0, sentinels=FORMS["deepseek"])

    psm = render_text("head middle tail", Draw("psm", 5, 11), rules=rules)

    assert "".join(piece.text or piece.control for piece in psm) == (
        "<\uff5cfim\u2581begin\uff5c>head <\uff5cfim\u2581hole\uff5c> tail"
        "<\uff5cfim\u2581end\uff5c>middle<|endoftext|>"
    )


@settings(deadline=None)
@given(
    st.text(max_size=20),
    st.integers(0, 9),
    st.text(max_size=500),
    st.integers(0, 99),
    st.integers(0, 3),
    st.sampled_from(["any", "syntax"]),
)
def test_a_draw_is_repeatable_and_within_the_text(record_id, part, text, seed, number, middle):
    rules = Rules(1.0, seed=seed, number=number, middle=middle)

    draw = draw_fim(record_id, part, text, rules)

    assert draw == draw_fim(record_id, part, text, rules)
    assert draw.order in ("psm", "spm")
    assert 0 <= draw.start <= draw.stop <= len(text)
    assert draw_fim(record_id, part, text, replace(rules, rate=0.0)).order == "none"


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.25), (0.1, 1.0)])
@pytest.mark.parametrize("number", [0, 2])
def test_rates_hold_within_three_standard_deviations(rate, spm_rate, number):
    total = 20_000
    rules = Rules(rate, spm_rate, number=number)
    draws = [draw_fim(f"r:{i // 4}", i % 4, "x" * 100, rules) for i in range(total)]

    for order, share in (
        ("none", 1 - rate),
        ("spm", rate * spm_rate),
        ("psm", rate * (1 - spm_rate)),
    ):
        found = sum(draw.order == order for draw in draws)
        assert abs(found - total * share) <= 3 * math.sqrt(total * share * (1 - share)) + 1e-9


def test_cut_points_are_uniform_over_the_places_between_characters():
    number, length = 30_000, 9
    rules = Rules(1.0, seed=1)
    draws = [draw_fim(f"r:{i}", 0, "x" * length, rules) for i in range(number)]

    counts = {(i, j): 0 for i in range(length + 1) for j in range(i, length + 1)}
    for draw in draws:
        counts[draw.start, draw.stop] += 1

    # Two ordered cuts fall on a place twice as often as two equal ones; chi-square, 54 degrees.
    chi_square = 0.0
    for (i, j), count in counts.items():
        expected = number * (1 if i == j else 2) / (length + 1) ** 2
        chi_square += (count - expected) ** 2 / expected
    assert chi_square < 54 + 4 * math.sqrt(2 * 54)


def test_another_seed_record_part_or_pass_gives_another_draw():
    text = "x" * 10_000
    draws = {
        draw_fim("a", 0, text, Rules(1.0, seed=1)),
        draw_fim("a", 0, text, Rules(1.0, seed=2)),
        draw_fim("b", 0, text, Rules(1.0, seed=1)),
        draw_fim("a", 1, text, Rules(1.0, seed=1)),
        draw_fim("a", 0, text, Rules(1.0, seed=1, number=1)),
    }

    assert len(draws) == 5


def test_the_first_pass_is_drawn_as_it_always_was():
    assert draw_fim("scikit-learn:x.py", 3, "x" * 1000, Rules(1.0)) == Draw("psm", 789, 907)


CODE = """def area(radius):
    \"\"\"Return it.\"\"\"
    name = "\u00e9\U0001f600"; total = 3 * radius
    return total
"""


def test_a_syntax_aligned_middle_is_a_statement_or_an_expression():
    rules = Rules(1.0, middle="syntax")

    draws = [draw_fim(f"r:{i}", 0, CODE, rules) for i in range(400)]

    assert {CODE[draw.start : draw.stop] for draw in draws} == {
        '"""Return it."""', 'name = "\u00e9\U0001f600"', '"\u00e9\U0001f600"', "name", "total",
        "total = 3 * radius", "3 * radius", "radius", "return total",
    }  # fmt: skip


def test_text_that_is_no_python_is_cut_anywhere():
    for text in ("for (;;) {}", "x = 1\r\n", "", "\0"):
        wanted = draw_fim("r", 0, text, Rules(1.0))
        assert draw_fim("r", 0, text, Rules(1.0, middle="syntax")) == wanted
