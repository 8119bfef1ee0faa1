"""A long run does not leak: memory and open files stay level over thousands of steps with everything switched on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = int(os.environ.get("ATOMTUNE_LONG_RUN", "5000"))
#: Seconds between two measurements.
LOOK_EVERY = 1.0
#: Relative growth of resident memory from the second quarter of a run to its last; allocators need this much.
MOST_GROWTH = 0.05


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_stay_level(models, dialogues, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    command += ["--dtype", "float32", "--max_steps", str(STEPS), "--per_device_train_batch_size", "2"]
    command += ["--logging_steps", "1", "--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "25"]
    command += ["--save_strategy", "steps", "--save_steps", "25", "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "atomtune", *command], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        looks: list[tuple[int, int]] = []  # (resident bytes, open files), since the first checkpoint
        while process.poll() is None:
            if list(out.glob("checkpoint-*")):
                looks.append((resident(process.pid), open_files(process.pid)))
            time.sleep(LOOK_EVERY)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text(encoding="utf-8")[-3000:]
    looks = [look for look in looks if all(look)]
    quarter = len(looks) // 4
    early, late = looks[quarter : 2 * quarter], looks[3 * quarter : -1]
    memory = [max(resident for resident, _ in part) for part in (early, late)]
    files = [max(count for _, count in part) for part in (early, late)]
    print(f"{STEPS:,} steps: resident {memory[0] / 1e6:.0f} → {memory[1] / 1e6:.0f} MB, files {files[0]} → {files[1]}")
    assert memory[1] < memory[0] * (1 + MOST_GROWTH)
    assert files[1] <= files[0] + 1  # a checkpoint may just be written


def resident(pid: int) -> int:
    """Bytes of resident memory; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # only the names are needed
    except OSError:
        return 0
