"""Attacks from outside, by kind: altered files, hostile templates, settings, records, streams, links and variables.

    python -m benchmarks.attacks                 all of them, as a table
    python -m benchmarks.attacks --kinds 1 3     some of the kinds

Every attack runs a command of atomtune in its own process. atomtune fails if the command
- ends in a traceback, by a signal or with the wrong exit code,
- uses more than 10 seconds of processor time,
- prints a control character to the terminal or a secret,
- or changes files that are not its own.
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import workloads

KINDS = {
    1: "files of a model or an adapter",
    2: "chat templates and tokenizer patterns",
    3: "settings",
    4: "the cache of encoded records",
    5: "words from data on a terminal",
    6: "links, secrets, files of others",
    7: "cost bounded by size",
    8: "streams and locales",
    9: "what is given as a base",
    10: "the environment",
    11: "resume against a changed world",
    12: "stops and failing disks",
    13: "numbers",
    14: "files and folders of records",
}
MOST_SECONDS = 10  # of processor time
_HANGS = 300  # by the wall clock, because other programs may use the machine too
#: Control characters, which a terminal would obey; tab and newline are harmless.
_ORDERS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")
_BUG = re.compile(rb"Traceback \(most recent|this is a bug")
ESCAPE = "\x1b[31mX\x9b2J"


@dataclass
class World:
    """The files that one attack may change: its own copies."""

    folder: Path
    base: Path
    data: Path
    run: Path  # a finished run with a checkpoint

    def train(self, *more: Any) -> list[str]:
        words = ["train", "--model_path", self.base, "--dataset_path", self.data, "--output_dir", self.folder / "out"]
        words += ["--max_steps", 1, "--dtype", "float32", "--eval_size", 0, "--use_cpu"]
        return [str(word) for word in (*words, *more)]

    def inspect(self, *more: Any) -> list[str]:
        return [str(word) for word in ("inspect", "--model_path", self.base, "--dataset_path", self.data, *more)]

    def chat(self, *more: Any) -> list[str]:
        words = ("chat", "--adapter_path", self.run, "--prompt", "Hi", "--max_new_tokens", 2, *more)
        return [str(word) for word in words]

    def resume(self, *more: Any) -> list[str]:
        words = ["train", "--model_path", self.base, "--dataset_path", self.data, "--output_dir", self.run]
        words += ["--max_steps", 2, "--save_steps", 1, "--dtype", "float32", "--eval_size", 0, "--use_cpu", "--resume"]
        return [str(word) for word in (*words, *more)]

    def records(self, *values: Any) -> None:
        self.data = self.folder / "attack.jsonl"
        lines = (value if isinstance(value, str) else json.dumps(value) for value in values)
        self.data.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Attack:
    """One attack: what is changed, the command, and the exit codes that are right."""

    kind: int
    name: str
    words: Callable[[World], list[str]]
    codes: tuple[int, ...] = (2,)
    variables: dict[str, str] = field(default_factory=dict)
    shell: str = ""  # a shell line around the command, to redirect its streams


def behind(
    kind: int, command: str, changes: dict[str, Callable[[World], object]], codes: tuple[int, ...] = (0, 2)
) -> Iterator[Attack]:
    """One attack per change: the command is run after the change."""
    for name, change in changes.items():

        def words(world: World, change: Callable[[World], object] = change) -> list[str]:
            change(world)
            return getattr(world, command)()  # type: ignore[no-any-return]

        yield Attack(kind, name, words, codes)


def among(cases: list[tuple[dict[str, str], tuple[int, ...]]]) -> Iterator[Attack]:
    """Attacks of kind 10: a run with these environment variables, and the exit codes that are right for each case."""
    for variables, codes in cases:
        yield Attack(10, str(variables), lambda world: world.train(), codes, variables, shell="{}")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def attacks() -> list[Attack]:
    from benchmarks import attempts, attempts_on_processes, attempts_on_records  # here, because they import this module

    rooms = (attempts, attempts_on_records, attempts_on_processes)
    return [attack for room in rooms for make in room.MAKERS for attack in make()]


def forked(words: list[str], output: Path, variables: dict[str, str] | None = None) -> tuple[int, float]:
    """Run a command in a fork of this process, which has imported everything: (exit code, processor seconds)."""
    child = os.fork()
    if child == 0:
        _be_command(words, output, variables or {})
    until = time.monotonic() + _HANGS
    while time.monotonic() < until:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9, float(_HANGS)


def _be_command(words: list[str], output: Path, variables: dict[str, str]) -> None:
    from atomtune.cli import main

    code = 200
    try:
        os.environ.update(variables)
        written = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        cache = output.parent / "cache"
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(os.environ.get("HF_DATASETS_CACHE", cache)) if variables else cache
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
        code = int(main(words))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def shelled(attack: Attack, words: list[str], output: Path) -> tuple[int, float]:
    """Run a command the way a shell starts it: (exit code, seconds of processor time)."""
    command = attack.shell.format(shlex.join([sys.executable, "-W", "ignore", "-m", "atomtune", *words]))
    cache = {"HF_DATASETS_CACHE": str(output.parent / "cache")}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with output.open("wb") as file:
        environment = {**os.environ, **cache, **attack.variables}
        done = subprocess.run(
            ["bash", "-c", command], check=False, stdout=file, stderr=file, env=environment, timeout=_HANGS
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime


def verdict(attack: Attack, world: World) -> str:
    """What went wrong in an attack; "" if nothing did."""
    others = world.folder / "others"
    others.mkdir()
    (others / "mine").write_text("mine")
    words = attack.words(world)
    before = sorted(path.name for path in others.iterdir())
    output = world.folder / "output"
    code, seconds = shelled(attack, words, output) if attack.shell else forked(words, output, attack.variables)
    text = output.read_bytes()
    problems = []
    if code not in attack.codes:
        problems.append(f"exit code {code}, expected {' or '.join(map(str, attack.codes))}")
    if _BUG.search(text):
        problems.append("a traceback")
    if _ORDERS.search(text):
        problems.append("a control character")
    if b"secret" in text:
        problems.append("a secret")
    # A new process first has to import torch, and a stopped one computes until the signal: three times as long.
    if seconds > MOST_SECONDS * (3 if attack.shell else 1):
        problems.append(f"{seconds:.0f} s")
    if sorted(path.name for path in others.iterdir()) != before or (others / "mine").read_text() != "mine":
        problems.append("something of others is changed")
    return "; ".join(problems)


def table(kinds: list[int]) -> list[str]:
    """Run the attacks and return a table with one row per kind; failures are printed at once."""
    import atomtune.export.merge
    import atomtune.inspect.command
    import atomtune.serve.chat
    import atomtune.train.run  # noqa: F401  # imported once, before the forks

    tried, failed = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        records = workloads.read(workloads.PERSONA, 40)
        world = World(
            root / "first", root / "base", workloads.write("short", records, root / "data.jsonl"), root / "run"
        )
        workloads.build_base(world.base, records, "toy")
        if not (world.base / "generation_config.json").exists():
            (world.base / "generation_config.json").write_text("{}")
        world.folder.mkdir()
        code, _ = forked(world.train("--output_dir", world.run, "--save_steps", 1), world.folder / "output")
        assert code == 0, (world.folder / "output").read_text()
        for number, attack in enumerate(attacks()):
            if attack.kind not in kinds:
                continue
            own = root / str(number)
            own.mkdir()
            copies = {part: Path(shutil.copytree(root / part, own / part)) for part in ("base", "run")}
            edit(copies["run"] / "adapter_config.json", base_model_name_or_path=str(copies["base"]))
            data = Path(shutil.copy(world.data, own / "data.jsonl"))
            problem = verdict(attack, World(own, copies["base"], data, copies["run"]))
            tried[attack.kind] += 1
            failed[attack.kind] += bool(problem)
            if problem:
                print(f"{attack.kind:2} {attack.name[:100]!r}: {problem}", flush=True)
            shutil.rmtree(own, ignore_errors=True)
    rows = [f"| {kind} | {KINDS[kind]} | {tried[kind]} | {failed[kind]} |" for kind in kinds]
    total = f"| | all | {sum(tried.values())} | {sum(failed.values())} |"
    return ["| | kind | attempts | failing |", "|---|---|---|---|", *rows, total]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", type=int, default=list(KINDS))
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("\n".join(table(options.kinds)))


if __name__ == "__main__":
    main()
