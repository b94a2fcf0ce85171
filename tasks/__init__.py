"""How Prefect runs a step: retries, names, artifacts, cached states; one pipelines call each."""

import logging

# Prefect gives extra loggers handlers but no level: without one, nothing of pipelines is shown.
logging.getLogger("pipelines").setLevel(logging.INFO)
