"""What the Hub's client raises where the Hub cannot be reached, or refuses."""


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
