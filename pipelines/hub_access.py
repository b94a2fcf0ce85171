"""What the Hub answers before anything is downloaded, and what its client raises."""

import os
from dataclasses import dataclass
from typing import Literal

ON = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a repository cannot be had: what is the matter, and the reason in words.

    `failed` is an error that the Hub itself answers; it may be gone in a moment.
    """

    kind: Literal["offline", "gated", "unknown", "revision", "failed", "unreached"]
    reason: str


def ask_hub(
    name: str, revision: str | None, repo_type: Literal["model", "dataset"]
) -> Refusal | None:
    """Ask whether this machine may download a repository; None where it may."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ON:
        return Refusal("offline", "HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        api = HfApi()
        # repo_info answers for gated ones to anybody.
        api.auth_check(name, repo_type=repo_type)
        api.repo_info(name, revision=revision, repo_type=repo_type, timeout=10)
    except GatedRepoError:
        who = "your token has no access to it" if get_token() else "no token is set here"
        return Refusal("gated", who)
    except RepositoryNotFoundError:
        return Refusal("unknown", "does not exist or needs a login")
    except RevisionNotFoundError:
        return Refusal("revision", f"has no revision {revision!r}")
    except HfHubHTTPError as error:
        return Refusal("failed", f"the hub cannot give it now ({type(error).__name__})")
    except hub_errors() as error:
        return Refusal("unreached", f"the hub cannot be reached ({type(error).__name__})")
    return None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors to catch around a call of huggingface_hub.

    Those of the library it talks through (it has been requests, httpx and httpx2: the client's own
    error derives from their common base, whichever it is), of the OS, of names that are none
    (ValueError), and of hf_xet, which carries large files (RuntimeError).
    """
    from huggingface_hub.errors import HfHubHTTPError

    transport = [base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx")]
    found = [base for base in transport if issubclass(base, Exception)]
    return (*found, OSError, ValueError, RuntimeError)
