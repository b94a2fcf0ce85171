"""Over any text: it comes back, it forges nothing, it is cut without loss."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.render.encode import encode_pieces, encode_rows
from pipelines.render.fim import Rules, restore_text
from pipelines.render.fragments import File
from pipelines.render.pieces import Piece
from pipelines.render.templates import CHAT_TOKENS
from pipelines.render.vocabulary import STARCODER_TOKENS
from tests.assets.rendering import small_splitter, small_tokenizer

CONTROLS = (*STARCODER_TOKENS, *CHAT_TOKENS)
NAMES = st.sampled_from(CONTROLS)
# Whole control strings, halves of them, and anything else, one beside the other.
TEXT = st.lists(
    NAMES | NAMES.map(lambda name: name[: len(name) // 2]) | st.text(max_size=8), max_size=6
).map("".join)
PIECE = st.one_of(
    st.builds(lambda text, trained: Piece(text or "x", None, trained), TEXT, st.booleans()),
    st.builds(lambda name, trained: Piece(None, name, trained), NAMES, st.booleans()),
)
ROW = st.lists(PIECE, max_size=8)


@settings(deadline=None)
@given(ROW)
def test_control_tokens_are_exactly_those_of_the_control_pieces(row):
    tokenizer = small_tokenizer()
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    example = encode_pieces(tokenizer, row)

    assert [tokenizer.id_to_token(i) for i in example.input_ids if i in special] == [
        piece.control for piece in row if piece.control
    ]


@settings(deadline=None)
@given(ROW)
def test_ids_decode_to_the_pieces_and_labels_to_the_trained_ones(row):
    tokenizer = small_tokenizer()

    example = encode_pieces(tokenizer, row)

    trained = [label for label in example.labels if label != -100]
    for ids, pieces in (
        (example.input_ids, row),
        (trained, [piece for piece in row if piece.trained]),
    ):
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert decoded == "".join(piece.text or piece.control for piece in pieces)
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (-100, i) for i, label in zip(*example, strict=True))


@settings(deadline=None)
@given(st.lists(ROW, max_size=5))
def test_rows_encoded_together_are_the_rows_encoded_alone(rows):
    tokenizer = small_tokenizer()

    assert encode_rows(tokenizer, rows) == [encode_pieces(tokenizer, row) for row in rows]


FILES = st.lists(st.tuples(st.text(max_size=4), TEXT.map(lambda text: text * 7)), max_size=4)


@settings(deadline=None)
@given(FILES, st.integers(32, 60), st.sampled_from([0.0, 0.5, 1.0]))
def test_fragments_join_to_the_file_and_fit_a_block(files, block_size, fim_rate):
    tokenizer = small_tokenizer()

    named = [File(name, text, Rules(fim_rate)) for name, text in files]
    groups = small_splitter(block_size).split(named)

    assert ["".join(f.text for f in group) for group in groups] == [text for _, text in files]
    for fragment in (fragment for group in groups for fragment in group):
        assert restore_text(fragment.pieces) == fragment.text
        assert len(encode_pieces(tokenizer, fragment.pieces).input_ids) <= block_size
