"""Where tokens end in their text, from the ids alone: a byte-level token is so many bytes long."""

import functools
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


@functools.lru_cache(maxsize=4)
def token_sizes(tokenizer: Tokenizer) -> Array | None:
    """Return the bytes of each id of a byte-level vocabulary; None for other vocabularies."""
    split = tokenizer.pre_tokenizer
    spec = json.loads(split.__getstate__()) if split is not None else {}
    steps = [spec, *spec.get("pretokenizers", ())]
    if tokenizer.normalizer is not None or all(step.get("type") != "ByteLevel" for step in steps):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
    # One character of a token stands for a byte.
    found[list(vocabulary.values())] = list(map(len, vocabulary))
    return found


def find_ends(
    data: Array, offsets: Array, ids: Array, counts: Array, sizes: Array | None
) -> list[Array] | None:
    """Return for each text the character offset at which each of its tokens ends.

    The texts are data[offsets[i]:offsets[i + 1]], UTF-8, and have counts[i] of the ids each. A
    token that ends within a character ends with it. None where ids do not tell.
    """
    if sizes is None:
        return None
    ends = np.cumsum(sizes[ids])
    last = np.cumsum(counts)
    if not np.array_equal(np.concatenate([[0], ends])[last], offsets[1:]):
        return None
    characters = np.cumsum((data & 0xC0) != 0x80)
    before = np.concatenate([[0], characters])[offsets[:-1]]
    stops = characters[ends - 1] - np.repeat(before, counts) if len(ids) else ends
    return np.split(stops, last[:-1]) if len(counts) else []
