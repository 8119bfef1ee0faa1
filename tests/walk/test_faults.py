"""Real processes are killed at a point of a save or at any moment; the resumed run equals the undisturbed one.

Each run is a process forked from one that has imported everything. `make soak` covers every point, and 100 moments.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALL = bool(os.environ.get("ATOMTUNE_SOAK"))
ROOT = Path(__file__).parents[2]

POINTS = """
import sys
from pathlib import Path
import atomtune.train.run
from benchmarks import faults
base, data, folder, stride = *map(Path, sys.argv[1:4]), int(sys.argv[4])
count = faults.points_of_a_save(faults.atomtune, base, data, folder / "whole")
assert count > 40, count
expected = faults.adapter(folder / "whole")
points = sorted({*range(1, count + 1, stride), count})
for point, outcome in faults.killed_at_points(faults.atomtune, base, data, folder, points=points, expected=expected):
    assert outcome == "identical", f"killed at point {point} of {count}: {outcome}"
print(len(points), "points")
"""

MOMENTS = """
import sys, time
from pathlib import Path
import atomtune.train.run
from benchmarks import faults
base, data, folder, rounds = *map(Path, sys.argv[1:4]), int(sys.argv[4])
began = time.perf_counter()
assert faults.forked(lambda: faults.atomtune(base, data, folder / "whole", resume=False)) == 0
longest, expected, kills = time.perf_counter() - began, faults.adapter(folder / "whole"), 0
for seed in range(10_000):
    if kills >= rounds:
        break
    killed, adapter = faults.killed_at_random(
        faults.atomtune, base, data, folder / f"run-{seed}", seed=seed, longest=longest
    )
    assert adapter == expected, f"seed {seed}"
    kills += killed
print(kills, "kills")
"""


def in_a_process(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_point_of_a_save_resumes_bit_identically(models, dialogues, tmp_path):
    assert "points" in in_a_process(POINTS, models("llama"), dialogues, tmp_path, 1 if ALL else 14)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_resumes_bit_identically(models, dialogues, tmp_path):
    assert "kills" in in_a_process(MOMENTS, models("llama"), dialogues, tmp_path, 100 if ALL else 8)
