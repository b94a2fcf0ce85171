"""Fill-in-the-middle loses nothing, keeps its rates and depends on the record alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.render.encode import encode_pieces
from pipelines.render.fim import Draw, draw_fim, render_text, restore_text
from pipelines.render.pieces import Piece
from tests.assets.rendering import small_tokenizer


@st.composite
def cuts(draw):
    text = draw(st.text(max_size=60))
    start, stop = sorted(draw(st.integers(0, len(text))) for _ in range(2))
    return text, Draw(draw(st.sampled_from(["none", "psm", "spm"])), start, stop)


@settings(deadline=None)
@given(cuts(), st.booleans())
def test_the_text_comes_back_from_the_pieces(cut, ends):
    text, draw = cut

    pieces = render_text(text, draw, ends=ends)

    assert restore_text(pieces) == text
    assert all(piece.trained for piece in pieces if piece.text or piece.control == "<|endoftext|>")
    assert not any(piece.trained for piece in pieces if (piece.control or "").startswith("<fim"))
    assert (pieces[-1:] == [Piece(control="<|endoftext|>", trained=True)]) == (
        ends or draw.order != "none"
    )


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


def test_the_two_orders_are_those_of_starcoder():
    text = "head middle tail"

    psm = render_text(text, Draw("psm", 5, 11))
    spm = render_text(text, Draw("spm", 5, 11))

    assert [piece.text or piece.control for piece in psm] == [
        "<fim_prefix>", "head ", "<fim_suffix>", " tail", "<fim_middle>", "middle", "<|endoftext|>",
    ]  # fmt: skip
    assert [piece.text or piece.control for piece in spm] == [
        "<fim_prefix>", "<fim_suffix>", " tail", "<fim_middle>", "head ", "middle", "<|endoftext|>",
    ]  # fmt: skip


@settings(deadline=None)
@given(st.text(max_size=20), st.integers(0, 9), st.integers(0, 500), st.integers(0, 99))
def test_a_draw_is_repeatable_and_within_the_text(record_id, part, length, seed):
    share = {"rate": 1.0, "spm_rate": 0.5, "seed": seed}

    draw = draw_fim(record_id, part, length, **share)

    assert draw == draw_fim(record_id, part, length, **share)
    assert draw.order in ("psm", "spm")
    assert 0 <= draw.start <= draw.stop <= length
    assert draw_fim(record_id, part, length, **{**share, "rate": 0.0}).order == "none"


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.25), (0.1, 1.0)])
def test_rates_hold_within_three_standard_deviations(rate, spm_rate):
    number = 20_000
    draws = [
        draw_fim(f"r:{i // 4}", i % 4, 100, rate=rate, spm_rate=spm_rate, seed=42)
        for i in range(number)
    ]

    for order, share in (
        ("none", 1 - rate),
        ("spm", rate * spm_rate),
        ("psm", rate * (1 - spm_rate)),
    ):
        found = sum(draw.order == order for draw in draws)
        assert abs(found - number * share) <= 3 * math.sqrt(number * share * (1 - share)) + 1e-9


def test_cut_points_are_uniform_over_the_places_between_characters():
    number, length = 30_000, 9
    draws = [draw_fim(f"r:{i}", 0, length, rate=1.0, spm_rate=0.5, seed=1) for i in range(number)]

    counts = {(i, j): 0 for i in range(length + 1) for j in range(i, length + 1)}
    for draw in draws:
        counts[draw.start, draw.stop] += 1

    # Two ordered cuts fall on a place twice as often as two equal ones; chi-square, 54 degrees.
    chi_square = 0.0
    for (i, j), count in counts.items():
        expected = number * (1 if i == j else 2) / (length + 1) ** 2
        chi_square += (count - expected) ** 2 / expected
    assert chi_square < 54 + 4 * math.sqrt(2 * 54)


def test_another_seed_record_or_part_gives_another_draw():
    fixed = {"length": 10_000, "rate": 1.0, "spm_rate": 0.5}
    draws = {
        draw_fim("a", 0, seed=1, **fixed),
        draw_fim("a", 0, seed=2, **fixed),
        draw_fim("b", 0, seed=1, **fixed),
        draw_fim("a", 1, seed=1, **fixed),
    }

    assert len(draws) == 4
