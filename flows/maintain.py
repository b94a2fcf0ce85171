"""Nightly upkeep of the store and of the server's runs."""

from prefect import State, flow
from prefect.states import Completed

from tasks import reports
from tasks.steps import explained
from tasks.upkeep import end_dead_runs, remove_abandoned, verify_store


@flow
@explained
def maintain() -> State[None]:
    """Verify the store, remove abandoned builds, end runs whose process is gone."""
    damaged = verify_store()
    freed = remove_abandoned()
    dead = end_dead_runs()
    message = (
        f"{len(damaged)} stages damaged, {len(freed)} abandoned builds removed "
        f"({sum(freed.values()) / 1e6:.1f} MB), {len(dead)} dead runs ended"
    )
    reports.show_upkeep(message, damaged, freed, dead)
    return Completed(message=message)
