"""How many bytes of text each token stands for: what makes losses of tokenizers comparable."""

import json
import re
from typing import Any

import numpy as np

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a byte that SentencePiece found no token for
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


def count_token_bytes(tokenizer: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of UTF-8 text of each token id, int64 [ids].

    0 for control tokens, which are no text; the others add up to the size of what was encoded.
    """
    inner = tokenizer.backend_tokenizer
    by_byte = '"ByteLevel"' in json.dumps(
        [json.loads(inner.to_str()).get(part) for part in ("pre_tokenizer", "decoder")]
    )
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    added = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
    vocabulary = inner.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if number in added:
            sizes[number] = len(added[number].encode())
        elif by_byte:  # one character stands for one byte
            sizes[number] = len(token)
        else:
            sizes[number] = 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
    return sizes
