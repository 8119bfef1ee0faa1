"""Four walks through the source, taken from real runs of `atomtune train` on one record and a tiny model.

record    functions entered while the data is read and in the first training step
setting   --lora_rank: the functions that hold its value, and their callers
bad line  the functions that hold a broken line or its place (`bad-line.jsonl:1`), and their callers
resume    functions that a resumed run enters outside data, batch and model
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.house.source import Source
from tools.house.trace import Function

#: A rank that equals no other number in the run.
RANK = "173"
#: The first and last function of each part of the record's walk: reading, then the first batch to the end of its step.
READING = ("read_data", "identity")
STEP = ("Collator.__call__", ".on_step_end")


@dataclass(frozen=True)
class Walk:
    """Functions in order of first entry, and all entries in order."""

    name: str
    source: Source
    entries: tuple[Function, ...]

    @cached_property
    def functions(self) -> list[Function]:
        return list(dict.fromkeys(self.entries))

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """The functions of each file; files and functions in order of first entry."""
        files: dict[str, list[str]] = {}
        for file, function in self.functions:
            files.setdefault(file, []).append(function)
        return files

    @cached_property
    def rooms(self) -> list[str]:
        return list(dict.fromkeys(room_of(file) for file in self.files))

    def file_lines(self) -> int:
        return sum(self.source.lines(file) for file in self.files)

    def function_lines(self) -> int:
        return sum(self.source.function_lines(file, name) for file, name in self.functions)

    def returns(self, place: Callable[[str], str] = str) -> int:
        """How often the first entries return to a file (or folder) that was left before."""
        visited: set[str] = set()
        count, here = 0, ""
        for file, _ in self.functions:
            there = place(file)
            if there != here:
                count += there in visited
                visited.add(there)
                here = there
        return count


def room_of(file: str) -> str:
    """The folder of a file: data/reading for data/reading/jsonl.py. A file outside all folders is its own."""
    return file.rpartition("/")[0] or file


def take_walks(source: Source, folder: Path | None = None) -> dict[str, Walk]:
    """Run the commands on this source tree and take the four walks from the functions that they entered."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return take_walks(source, Path(temporary))
    base, records, broken = lay_material(folder)
    common = ["--model_path", base, "--dtype", "float32", "--logging_steps", "1", "--save_steps", "1"]

    def run(data: str, *more: str, holding: str = "", depth: int = 0) -> dict[str, Any]:
        traced = {"TRACED_VALUE": holding, "TRACED_DEPTH": str(depth)}
        return traced_run(source, folder, ["train", "--dataset_path", data, *common, *more], traced)

    rank = ["--lora_rank", RANK, "--output_dir", "out"]
    plain = run(records, *rank, "--max_steps", "1", holding=RANK, depth=1)
    resumed = run(records, *rank, "--max_steps", "2", "--resume")
    refused = run(broken, "--output_dir", "refused", holding=f"{broken}:1", depth=2)
    entered = entries_of(plain)
    walks = {
        "record": between(entered, *READING) + between(entered, *STEP),
        "setting": holders_of(plain),
        "bad line": holders_of(refused),
        "resume": [f for f in entries_of(resumed) if f[0].split("/")[0] not in ("data", "batch", "model")],
    }
    return {name: Walk(name, source, tuple(entries)) for name, entries in walks.items()}


def lay_material(folder: Path) -> tuple[str, str, str]:
    """Write a tiny model, a file with one record and a file with a broken line; their names in the folder."""
    from tests.conftest import DIALOGUES, write_jsonl
    from tests.tiny import build

    (folder / "base").mkdir()
    build("llama", folder / "base")
    write_jsonl(folder / "one-record.jsonl", DIALOGUES[:1])
    (folder / "bad-line.jsonl").write_text('{"instruction": "Who are you?", \n', encoding="utf-8")
    return "base", "one-record.jsonl", "bad-line.jsonl"


def traced_run(source: Source, folder: Path, command: Sequence[str], traced: dict[str, str]) -> dict[str, Any]:
    """The trace of one command, run in its own process."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | traced | {
        "PYTHONPATH": os.pathsep.join([str(source.folder.parent), str(root)]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    arguments = [sys.executable, "-m", "tools.house.trace", "trace.json", *command]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the traced run failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    trace: dict[str, Any] = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    expected = 2 if "bad-line.jsonl" in command else 0
    if trace["exit"] != expected:
        raise SystemExit(f"the traced run ended with {trace['exit']}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return trace


def entries_of(trace: dict[str, Any]) -> list[Function]:
    return [tuple(trace["functions"][number]) for number in trace["entries"]]


def holders_of(trace: dict[str, Any]) -> list[Function]:
    return [tuple(trace["functions"][number]) for number in trace["holders"]]


def between(entries: Iterable[Function], first: str, last: str) -> list[Function]:
    """The entries from the first one of `first` up to the next one of `last`; names are compared by their ends."""
    entries = list(entries)
    starts = [i for i, (_, name) in enumerate(entries) if name.endswith(first)]
    if not starts:
        raise SystemExit(f"no function {first} was entered: name the new landmark in tools/house/walks.py")
    ends = [i for i, (_, name) in enumerate(entries) if name.endswith(last) and i > starts[0]]
    if not ends:
        raise SystemExit(f"no function {last} was entered: name the new landmark in tools/house/walks.py")
    return entries[starts[0] : ends[0]]
