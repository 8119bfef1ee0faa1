"""Laws of the environment: what a launcher sets passes, what another job left behind is said."""

import pytest

from atomtune.settings.environment import environment_problems, waiting_notice

FOUR = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        FOUR,
        FOUR | {"RANK": "3", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},  # a cluster's defaults, with no job
        FOUR | {"WORLD_SIZE": "1"},
    ],
)
def test_what_a_launcher_sets_passes(environment):
    assert list(environment_problems(environment)) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "not RANK, MASTER_ADDR, MASTER_PORT", "unset WORLD_SIZE")),
        ({"RANK": "2"}, ("RANK=2", "unset RANK")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("RANK=0, WORLD_SIZE=2", "not MASTER_ADDR, MASTER_PORT")),
        (FOUR | {"RANK": "4"}, ("RANK=4 of WORLD_SIZE=4", "unset RANK WORLD_SIZE")),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0", "unset WORLD_SIZE")),
        (FOUR | {"WORLD_SIZE": "many"}, ("WORLD_SIZE is 'many'", "a whole number")),
        (FOUR | {"LOCAL_RANK": "-1"}, ("LOCAL_RANK is '-1'",)),
    ],
)
def test_what_is_left_over_is_said_with_the_remedy(environment, named):
    (said,) = environment_problems(environment)
    assert all(part in said for part in (*named, "torchrun"))


def test_a_job_that_torchrun_did_not_start_is_told_that_it_waits():
    assert "process 0 of 4" in str(waiting_notice(FOUR))
    assert waiting_notice(FOUR | {"TORCHELASTIC_RUN_ID": "none"}) is None
    assert waiting_notice(FOUR | {"WORLD_SIZE": "1"}) is None
    assert waiting_notice({}) is None
