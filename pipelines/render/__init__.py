"""Rendering: records become pieces, pieces become tokens with labels, tokens become packed shards.

One renderer serves training, evaluation and serving; content never yields a control token.
"""
