"""The cluster runner without Ray: what is checked before, what an order does, what it waits for."""

import cloudpickle
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.engine import Job, Work
from pipelines.errors import PreflightError, StoreError
from pipelines.plan import get_stage, software_of
from tasks import cluster, engine
from tasks.cluster import check_api, check_cluster, is_here, ray_address, worker_environment
from tasks.engine import Order, RayCluster, do_order, make_shards, open_cluster, split_jobs
from tests.assets.live_server import free_port
from tests.assets.shard_functions import die_always, double

STAGE = "decontaminate"
OTHER = "192.0.2.77"  # reserved for documentation: never this machine


@pytest.fixture
def order(tmp_path):
    """An order of three jobs."""
    jobs = []
    for number in range(3):
        path = tmp_path / f"in-{number}"
        path.write_text(f"{number}\n" * (number + 2))
        jobs.append(Job(f"out-{number}.txt", (path,)))
    folder = tmp_path / "build"
    folder.mkdir()
    return Order(double, folder, tuple(jobs), {}, STAGE, software_of(get_stage(STAGE)))


@pytest.fixture
def installed(monkeypatch):
    """As if the extra was installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """A home without a Ray token."""
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)


def changed(order, **changes):
    fields = {name: getattr(order, name) for name in Order.__slots__}
    return Order(**{**fields, **changes})


@pytest.mark.parametrize(
    "address", ["auto", "head:6379", "10.0.0.1:6379", "head.example:10001", "[fd00::1]:6379"]
)
def test_an_address_is_taken_as_it_is(address):
    assert ray_address({"STARLOOM_RAY_ADDRESS": f" {address} "}) == address


def test_without_an_address_this_machine_does_the_work(monkeypatch):
    monkeypatch.delenv("STARLOOM_RAY_ADDRESS", raising=False)

    with open_cluster(get_stage(STAGE)) as none:
        assert none is None
    assert ray_address({"STARLOOM_RAY_ADDRESS": " "}) is None


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", "ray://", "a b:1"])
def test_what_is_no_address_is_refused_in_one_line(address):
    with pytest.raises(PreflightError, match="expected auto or HOST:PORT, the head") as info:
        check_cluster({"STARLOOM_RAY_ADDRESS": address})

    assert repr(address) in str(info.value)


def test_a_missing_extra_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(PreflightError, match=r"Ray is not installed: run .*\[ray\]"):
        check_cluster({"STARLOOM_RAY_ADDRESS": "auto"})


def test_a_head_that_does_not_answer_is_said_at_once(installed):
    address = f"127.0.0.1:{free_port()}"

    with pytest.raises(PreflightError, match="no Ray head answers there .*ray start --head"):
        check_cluster({"STARLOOM_RAY_ADDRESS": address})


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:4200/api", "http://localhost:4200/api"])
def test_other_machines_need_an_api_that_they_can_reach(url):
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(PreflightError, match=f"other machines .{OTHER}.*{url or 'not set'}"),
    ):
        check_api(["127.0.0.1", OTHER])


def test_one_machine_or_a_reachable_api_are_fine():
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        check_api(["127.0.0.1", "localhost", "::1"])
    with temporary_settings({PREFECT_API_URL: f"http://{OTHER}:4200/api"}):
        check_api(["127.0.0.1", OTHER])


def test_a_name_that_nobody_knows_is_another_machine():
    assert not is_here("no-such-host.invalid")
    assert not is_here(OTHER)
    assert is_here("127.0.0.1")


def test_a_token_that_is_there_is_used_and_telemetry_is_off(
    installed, no_token, monkeypatch, tmp_path
):
    monkeypatch.setattr(cluster, "_check_head", lambda *_: None)
    environment = {"STARLOOM_RAY_ADDRESS": "127.0.0.1:6379"}

    assert check_cluster(environment) == "127.0.0.1:6379"
    assert "RAY_AUTH_MODE" not in environment
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    check_cluster(environment)

    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}])
def test_another_machine_without_a_token_is_refused(installed, no_token, monkeypatch, given):
    monkeypatch.setattr(cluster, "_check_head", lambda *_: None)
    address = {"STARLOOM_RAY_ADDRESS": f"{OTHER}:6379", **given}
    with temporary_settings({PREFECT_API_URL: f"http://{OTHER}:4200/api"}):
        with pytest.raises(PreflightError, match="no Ray token is here: copy ~/.ray/auth_token"):
            check_cluster(dict(address))
        for choice in ({"RAY_AUTH_TOKEN": "token"}, {"RAY_AUTH_MODE": "disabled"}):
            environment = {**address, **choice}
            check_cluster(environment)
            assert environment["RAY_AUTH_MODE"] == choice.get("RAY_AUTH_MODE", "token")


def test_workers_get_threads_allocator_and_data_folder_but_no_secret(data_root):
    secrets = {"HF_TOKEN": "s1", "GITHUB_TOKEN": "s2", "RAY_AUTH_TOKEN": "s3", "HTTP_PROXY": "s4"}

    found = worker_environment({**secrets, "STARLOOM_LID_MODEL": "/m/lid.ftz", "PATH": "/bin"})

    assert set(found) & {*secrets, "PATH"} == set()
    assert found["STARLOOM_DATA"] == str(data_root)
    assert found["STARLOOM_LID_MODEL"] == "/m/lid.ftz"
    assert found["OMP_NUM_THREADS"] == "1"
    assert int(found["MALLOC_TRIM_THRESHOLD_"]) >= 2**30
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("number", "workers", "groups"), [(3, 8, 3), (1000, 2, 8), (1000, 40, 64), (1000, 200, 200)]
)
def test_jobs_share_task_runs_and_each_is_in_one(number, workers, groups):
    jobs = [Job(f"out-{n:05d}", ()) for n in range(number)]

    found = split_jobs(jobs, workers)

    assert len(found) == groups
    assert sorted(job.file for group in found for job in group) == [job.file for job in jobs]
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_an_order_makes_what_is_missing_and_reports_all(order):
    alone = Work(order.folder.parent / "alone")
    alone.path.mkdir()
    expected = alone.map(double, order.jobs, {})

    first = do_order(changed(order, jobs=order.jobs[:1]))
    # Were the first one made again, this process would die.
    again = do_order(changed(order, jobs=order.jobs[:1], function=die_always))
    made = make_shards.task.fn("decontaminate out-0.txt", cloudpickle.dumps(order))

    assert tuple(report for report, _ in made) == expected
    assert first[0][0] == again[0][0] == expected[0]
    assert again[0][1].cpu == 0.0


def test_a_machine_without_the_shared_folder_says_so(order):
    with pytest.raises(StoreError, match="does not see .*mount the folder that STARLOOM_DATA"):
        do_order(changed(order, folder=order.folder / "elsewhere"))


def test_a_machine_with_other_code_or_libraries_makes_nothing(order):
    code, versions = order.software
    name = next(iter(versions))

    with pytest.raises(PreflightError, match="has other code for stage .*the same commit"):
        do_order(changed(order, software=("0" * 64, versions)))
    with pytest.raises(PreflightError, match=rf"has {name} .* \(expected 0.1\): install with"):
        do_order(changed(order, software=(code, {**versions, name: "0.1"})))

    assert list(order.folder.iterdir()) == []


def test_a_file_that_does_not_arrive_is_an_error_about_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "VISIBLE_SECONDS", 0.0)
    (tmp_path / "there").write_bytes(b"1234")

    engine._wait_visible(tmp_path / "there", 4)
    with pytest.raises(StoreError, match="made on the cluster, but is not here"):
        engine._wait_visible(tmp_path / "there", 5)


def test_a_chosen_number_of_workers_needs_no_connection():
    assert RayCluster("auto", get_stage(STAGE), 12).workers == 12
