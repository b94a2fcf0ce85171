"""prepare and refresh: a task run per stage of the plan, hits marked, what changed announced."""

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Running

from flows.maintain import maintain
from flows.prepare import prepare
from flows.refresh import refresh
from pipelines.plan import STAGES
from pipelines.recipe import load_recipe
from tasks import sources
from tasks.stages import build
from tests.assets.flow_runs import LICENSE, read_artifacts, read_messages, read_tasks

NAMES = [stage.name for stage in STAGES]
pytestmark = pytest.mark.flow


def test_prepare_runs_one_task_for_each_stage_of_the_plan_in_its_order(client, prepared):
    tasks = read_tasks(client, prepared, len(NAMES) + 2)

    assert [task.name for task in tasks] == ["preflight", "fetch", *NAMES]
    assert {task.state_name for task in tasks if task.name != "fetch"} == {"Completed"}
    assert list(prepared.result()) == NAMES


def test_prepare_publishes_funnel_tokens_and_mask_with_a_verdict_each(client, prepared):
    refs = prepared.result()

    found = read_artifacts(client, prepared)

    assert set(found) == {"dataset-funnel", "token-report", "mask-audit"}
    kept = f"{refs['collect'].rows:,} records collected, {refs['split'].rows:,} kept"
    assert kept in found["dataset-funnel"]["description"]
    assert f"{refs['pack'].tokens:,} tokens" in found["token-report"]["description"]
    for name in NAMES:
        assert f"| {name} " in found["dataset-funnel"]["data"]


def test_a_second_prepare_ends_every_stage_cached_with_the_time_it_saved(
    client, prepared, prepared_root, corpus
):
    again = prepare("quickstart", str(corpus), LICENSE, smoke=True, return_state=True)

    tasks = read_tasks(client, again, len(NAMES) + 2)[2:]
    assert [(task.name, task.state_name) for task in tasks] == [(name, "Cached") for name in NAMES]
    assert all("built in" in task.state.message for task in tasks)
    assert all(task.state.type.value == "COMPLETED" for task in tasks)
    assert again.message.endswith(f"{len(NAMES)} of {len(NAMES)} stages reused")
    before, after = prepared.result(), again.result()
    assert {name: ref.digest for name, ref in after.items()} == {
        name: ref.digest for name, ref in before.items()
    }


def test_cached_states_come_through_map_and_submit(client, prepared, prepared_root, corpus):
    from prefect import flow, unmapped

    recipe = load_recipe("quickstart", data=str(corpus), overrides=LICENSE, smoke=True)

    @flow
    def mapped():
        futures = build.task.map(["collect", "collect"], unmapped(recipe), unmapped({}))
        return [future.wait() or future.state.name for future in futures], futures.result()

    names, refs = mapped()

    assert names == ["Cached", "Cached"]
    assert [ref.digest for ref in refs] == [prepared.result()["collect"].digest] * 2


def test_a_wrong_recipe_fails_with_all_its_problems_in_one_line_and_no_traceback(client):
    state = prepare("quikstart", return_state=True)
    wrong = prepare("quickstart", overrides={"training.max_stps": 1}, return_state=True)

    assert (state.name, wrong.name) == ("Failed", "Failed")
    assert "unknown recipe 'quikstart', did you mean 'quickstart'?" in state.message
    assert "training.max_stps: unknown key, did you mean 'max_steps'?" in wrong.message
    assert not [text for text in read_messages(client, wrong) if "Traceback" in text]


def test_refresh_starts_prepare_for_changed_recipes_once(monkeypatch, corpus, data_root):
    recipe = load_recipe("quickstart", data=str(corpus), overrides=LICENSE, smoke=True)
    started, events = [], []
    monkeypatch.setattr(sources, "recipe_names", lambda: ["quickstart"])
    monkeypatch.setattr(sources, "load_recipe", lambda name: recipe)
    monkeypatch.setattr(sources, "run_deployment", lambda name, **kw: started.append((name, kw)))
    monkeypatch.setattr(sources, "emit_event", lambda **kw: events.append(kw))

    first = refresh("stdlib", return_state=True)
    second = refresh("stdlib", return_state=True)
    (corpus / "json" / "new.py").write_text('def added():\n    """A new function."""\n')
    third = refresh("stdlib", return_state=True)

    assert [state.message for state in (first, second, third)] == [
        "stdlib: changed for quickstart", "stdlib: nothing new", "stdlib: changed for quickstart",
    ]  # fmt: skip
    assert [(name, kw["parameters"]) for name, kw in started] == [
        ("prepare/default", {"recipe": "quickstart"})
    ] * 2
    assert len({kw["idempotency_key"] for _, kw in started}) == 2
    assert [event["event"] for event in events] == ["starloom.source.refreshed"] * 2
    assert [event["payload"]["recipe"] for event in events] == ["quickstart"] * 2
    (corpus / "json" / "new.py").unlink()


def test_a_recipe_with_auto_train_is_trained_where_its_data_changed(monkeypatch, corpus, data_root):
    wanted = {**LICENSE, "auto_train": True}
    recipe = load_recipe("quickstart", data=str(corpus), overrides=wanted, smoke=True)
    started = []
    monkeypatch.setattr(sources, "recipe_names", lambda: ["quickstart"])
    monkeypatch.setattr(sources, "load_recipe", lambda name: recipe)
    monkeypatch.setattr(sources, "run_deployment", lambda name, **kw: started.append((name, kw)))
    monkeypatch.setattr(sources, "emit_event", lambda **kw: None)

    refresh("stdlib", return_state=True)

    assert [(name, kw["parameters"]) for name, kw in started] == [
        ("finetune/quickstart", {"recipe": "quickstart"})
    ]


def test_an_unknown_source_is_named_in_one_line():
    unknown = refresh("scikit-lern", return_state=True)

    assert unknown.name == "Failed"
    assert "no recipe uses a source 'scikit-lern', did you mean 'scikit-learn'?" in unknown.message
    assert "\n" not in unknown.message


def test_maintain_names_damaged_stages_and_keeps_finished_ones(client, prepared, prepared_root):
    folder = prepared_root / "store" / prepared.result()["collect"].folder
    (folder / "records-00000.parquet").write_bytes(b"cut")

    with get_client(sync_client=True) as other:
        flow_id = other.create_flow_from_name("lost")
        lost = other.create_flow_run_from_deployment(other.create_deployment(flow_id, name="lost"))
        other.update_flow_run(lost.id, infrastructure_pid="1")
        other.set_flow_run_state(lost.id, Running(), force=True)

    state = maintain(return_state=True)

    assert state.message == (
        "1 stages damaged, 0 abandoned builds removed (0.0 MB), 1 dead runs ended"
    )
    assert client.read_flow_run(lost.id).state_name == "Crashed"
    artifact = read_artifacts(client, state)["maintenance"]
    assert artifact["description"] == state.message
    assert prepared.result()["collect"].folder in artifact["data"]
    assert folder.is_dir()
