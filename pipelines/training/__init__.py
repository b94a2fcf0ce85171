"""Training: models, packed batches, exact losses, checkpoints, and the processes that run it.

Knows no source and no template: it reads packed shards and a tokenizer folder, and writes a run.
"""
