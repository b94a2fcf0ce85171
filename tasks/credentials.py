"""Secrets of the workers: from their environment, or a Secret block; never from parameters."""

import os

from prefect.blocks.system import Secret

from pipelines.errors import PreflightError
from pipelines.evals.push import TOKEN, read_token

# The setting that names the Secret block with the Hub's token, for workers without HF_TOKEN.
BLOCK_SETTING, DEFAULT_BLOCK = "STARLOOM_HF_TOKEN_BLOCK", "hf-token"


def load_token() -> str:
    """Return the Hub's token: HF_TOKEN, else the Secret block; PreflightError without both."""
    if os.environ.get(TOKEN):
        return read_token(os.environ)
    name = os.environ.get(BLOCK_SETTING) or DEFAULT_BLOCK
    try:
        block = Secret.load(name)
    except ValueError:
        raise PreflightError(
            f"a push needs a token with write access: set {TOKEN} for the worker, or make a Secret "
            f"block {name!r} in the UI (another name: {BLOCK_SETTING})"
        ) from None
    return read_token({TOKEN: str(block.get())})  # type: ignore[union-attr]
