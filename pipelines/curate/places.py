"""A number in [0, 1) for a name: what decides by chance without depending on order."""

import hashlib


def place_of(name: str, seed: int) -> float:
    """Return the sha256 of seed and name as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
