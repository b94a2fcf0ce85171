"""The work itself, in plain Python: records, stages, rendering, training, evaluation.

Nothing below this package imports Prefect; `starloom run RECIPE` needs no server.
"""
