"""The stage store: hits, damage, crashes, locks, and why something was rebuilt."""

import errno
import json
import multiprocessing
import os

import pytest

from pipelines.engine import Built, Job, Outcome
from pipelines.errors import DiskFull, StoreError
from pipelines.manifest import Counts
from pipelines.store import StageSpec, Store
from pipelines.why import explain_rebuild
from tests.assets.shard_functions import build_slowly


def write_shard(inputs, output, params):
    output.write_text("".join(f"{params['word']} {i}\n" for i in range(params["rows"])))
    return Outcome(Counts(rows_in=params["rows"], rows_out=params["rows"], used=params["rows"]))


def spec(word="hello", **changes):
    return StageSpec("stage", params={"word": word, "rows": 3}, code="c0de", **changes)


def builder(num_shards=3, calls=None, fail_after=None):
    def build(work):
        def counted(inputs, output, params):
            if calls is not None:
                if fail_after is not None and len(calls) == fail_after:
                    raise KeyboardInterrupt
                calls.append(output.name)
            return write_shard(inputs, output, params)

        jobs = [Job(f"rows-{i}.txt", ()) for i in range(num_shards)]
        return Built(work.map(counted, jobs, {"word": "hello", "rows": 3}))

    return build


def test_a_finished_stage_is_built_once_and_then_found(tmp_path):
    store, calls = Store(tmp_path), []

    first = store.build(spec(), builder(calls=calls))
    second = Store(tmp_path).build(spec(), builder(calls=calls))

    assert len(calls) == 3
    assert (first.cached, second.cached) == (False, True)
    assert second.digest == first.digest
    assert second.rows == 9
    assert sorted(p.name for p in store.path(first).iterdir()) == [
        "manifest.json",
        "rows-0.txt",
        "rows-1.txt",
        "rows-2.txt",
    ]


def test_an_interrupted_build_redoes_only_the_shards_that_were_not_finished(tmp_path):
    store, calls = Store(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        store.build(spec(), builder(num_shards=5, calls=calls, fail_after=3))

    undisturbed = Store(tmp_path / "other").build(spec(), builder(num_shards=5))
    resumed = store.build(spec(), builder(num_shards=5, calls=calls))

    assert len(calls) == 5
    assert resumed.digest == undisturbed.digest
    assert not list(tmp_path.glob("stage/.building-*"))


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "swapped", "manifest", "no manifest"]
)
def test_a_damaged_stage_is_never_a_hit_and_is_built_again(tmp_path, damage):
    store = Store(tmp_path)
    ref = store.build(spec(), builder())
    one, two = store.path(ref) / "rows-0.txt", store.path(ref) / "rows-1.txt"
    two.write_text(two.read_text().replace("hello", "HELLO")) if damage == "swapped" else None
    if damage == "missing":
        one.unlink()
    elif damage == "truncated":
        one.write_bytes(one.read_bytes()[:-1])
    elif damage == "flipped":
        one.write_bytes(one.read_bytes().replace(b"h", b"i", 1))
    elif damage == "no manifest":
        (store.path(ref) / "manifest.json").unlink()
    elif damage == "manifest":
        (store.path(ref) / "manifest.json").write_text("{")

    calls = []
    fresh = Store(tmp_path)
    problems = fresh.verify()
    again = fresh.build(spec(), builder(calls=calls))

    assert list(problems) == [ref.folder]
    assert (again.cached, again.digest, len(calls)) == (False, ref.digest, 3)
    assert Store(tmp_path).verify() == {}


def test_counts_that_do_not_add_up_stop_the_build(tmp_path):
    def lose_a_row(inputs, output, params):
        output.write_text("x")
        return Outcome(Counts(rows_in=2, rows_out=1, used=1))

    with pytest.raises(AssertionError, match="2 rows in, but 1 used and 0 dropped"):
        Store(tmp_path).build(spec(), lambda work: Built((work.one(lose_a_row, Job("a", ()), {}),)))


def test_a_full_disk_says_so_and_keeps_finished_shards(tmp_path):
    store, calls = Store(tmp_path), []

    def full(work):
        def write(inputs, output, params):
            if output.name.startswith(".rows-1"):
                raise OSError(errno.ENOSPC, "No space left on device")
            calls.append(output.name)
            return write_shard(inputs, output, params)

        jobs = [Job(f"rows-{i}.txt", ()) for i in range(3)]
        return Built(work.map(write, jobs, {"word": "hello", "rows": 3}))

    with pytest.raises(DiskFull, match="no space left while building stage 'stage'"):
        store.build(spec(), full)
    assert len(calls) == 1
    store.build(spec(), builder(calls=calls))
    assert len(calls) == 3


def test_two_processes_build_the_same_stage_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    racers = [context.Process(target=build_slowly, args=(tmp_path, ready)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)

    assert [racer.exitcode for racer in racers] == [0] * 4
    assert (tmp_path / "calls").read_text() == "x"


def test_a_killed_builder_releases_its_lock_and_the_next_one_finishes(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    racer = context.Process(target=build_slowly, args=(tmp_path, ready))
    racer.start()
    assert ready.wait(60)
    racer.kill()
    racer.join(20)

    ref = Store(tmp_path).build(spec(), builder())

    assert ref.rows == 9


def test_why_names_what_changed_between_two_builds(tmp_path):
    store = Store(tmp_path, context={"recipe": "quickstart"})
    upstream = store.build(StageSpec("before", {}, "c"), builder())
    store.build(spec(upstream={"before": upstream}), builder())
    other = Store(tmp_path, context={"recipe": "other"})
    other.build(spec("something else"), builder())
    store.build(spec("bye", upstream={"before": upstream}), builder())
    store.build(spec("bye", upstream={"before": upstream}), builder())

    lines = explain_rebuild(store, "stage", "quickstart")

    assert lines[0].startswith("stage: built ")
    assert lines[2:] == ["  params.word: hello -> bye", "  reused 1 times since"]
    assert explain_rebuild(store, "nothing") == ["nothing: never built"]


def test_garbage_collection_spares_what_is_kept_being_built_or_young(tmp_path):
    store = Store(tmp_path)
    kept, young, old = (store.build(spec(word), builder()) for word in ("kept", "young", "old"))
    for ref in (kept, old):
        os.utime(store.path(ref), (0, 0))

    freed = store.collect_garbage({kept.folder}, older_than=3600)

    assert list(freed) == [old.folder]
    assert freed[old.folder] > 0
    assert store.path(kept).exists()
    assert store.path(young).exists()


def test_a_reference_to_a_removed_stage_is_a_clear_error(tmp_path):
    store = Store(tmp_path)
    ref = store.build(spec(), builder())
    for path in store.path(ref).iterdir():
        path.unlink()

    with pytest.raises(StoreError, match="no readable manifest.json"):
        store.manifest(ref)


def test_the_log_survives_a_line_cut_by_a_kill(tmp_path):
    store = Store(tmp_path)
    store.build(spec(), builder())
    with (tmp_path / "stage" / "log.jsonl").open("a") as file:
        file.write('{"time": "20')

    assert [json.dumps(use["cached"]) for use in store.log("stage")] == ["false"]
