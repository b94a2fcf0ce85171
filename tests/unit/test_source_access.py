"""The access to what a run would fetch is checked before it begins."""

import sys

import pytest

from pipelines.errors import PreflightError
from pipelines.preflight import checks
from pipelines.preflight.fitting import Asked
from pipelines.preflight.source_access import access_problems, missing_sources
from pipelines.recipe import load_recipe


def test_a_dataset_of_the_hub_is_asked_for_before_a_run_would_fetch_it(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    # What the client talks through, and whose errors it lets out: by version httpx or httpx2.
    hub_http = sys.modules[HfHubHTTPError.__mro__[1].__module__]

    class Hub:
        def auth_check(self, name, repo_type):
            if name == "closed/trees":
                request = hub_http.Request("GET", "https://x")
                raise GatedRepoError("403", response=hub_http.Response(403, request=request))
            if name == "far/trees":
                raise hub_http.ConnectError("no route")

        def repo_info(self, name, revision, repo_type, timeout):
            if name == "old/trees":
                request = hub_http.Request("GET", "https://x")
                raise RevisionNotFoundError("404", response=hub_http.Response(404, request=request))
            assert (name, revision, repo_type) == ("open/trees", "main", "dataset")

    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def problems(name):
        changes = {"sources.0.dataset": name, "sources.0.revision": "main"}
        recipe = load_recipe("oasst", overrides=changes)
        assert [source.id for source in missing_sources(recipe)] == ["oasst"]
        return access_problems(recipe)

    mine = "or give your own copy with `--data PATH` or the source's `path:`"
    assert problems("open/trees") == []
    closed = (
        "sources.0: dataset 'closed/trees' is gated and no token is set here: accept its terms on "
        "https://huggingface.co/datasets/closed/trees in the browser, then `hf auth login` (or "
        f"HF_TOKEN=<a token with read access> in the environment); {mine}"
    )
    assert problems("closed/trees") == [closed]
    old = (
        "sources.0: dataset 'old/trees' has no revision 'main': see "
        f"https://huggingface.co/datasets/old/trees; {mine}"
    )
    assert problems("old/trees") == [old]
    unreached = (
        "sources.0: dataset 'far/trees' is not in the hub's cache and the hub cannot be reached "
        f"(ConnectError): run the same command where it is reached, {mine}"
    )
    assert problems("far/trees") == [unreached]
    asked = Asked("oasst", None, {"sources.0.dataset": "far/trees"}, smoke=True)
    with pytest.raises(PreflightError, match="far/trees.* is not in the hub's cache"):
        checks.check(asked.load(), tmp_path, asked=asked)

    (tmp_path / "hub" / "datasets--far--trees" / "snapshots" / "1f" / "data").mkdir(parents=True)
    assert problems("far/trees") == []
