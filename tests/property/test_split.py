"""A split is a function of seed and group name, and of nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.curate.split import assign_split

SHARES = st.floats(0, 0.5, exclude_max=True)
SETTINGS = st.fixed_dictionaries({"seed": st.integers(), "validation": SHARES, "test": SHARES})


@given(st.text(), SETTINGS)
def test_a_group_always_lands_in_one_and_the_same_split(group, settings):
    first = assign_split(group, settings)

    assert first in ("train", "validation", "test")
    assert assign_split(group, dict(settings)) == first


@given(st.text(), SETTINGS, SHARES)
def test_a_greater_share_only_takes_groups_in_and_leaves_the_test_set_alone(group, settings, share):
    smaller, greater = sorted((settings["validation"], share))
    before = assign_split(group, {**settings, "validation": smaller})
    after = assign_split(group, {**settings, "validation": greater})

    assert (before, after) in {
        ("train", "train"), ("train", "validation"), ("validation", "validation"),
        ("test", "test"),
    }  # fmt: skip


@given(st.text(), SETTINGS)
def test_shares_of_nothing_hold_nothing_out(group, settings):
    assert assign_split(group, {**settings, "validation": 0.0, "test": 0.0}) == "train"
