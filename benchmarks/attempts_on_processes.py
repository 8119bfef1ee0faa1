"""Attempts on processes: attacks of kinds 5, 8, 10 and 12 on a process's streams, names, environment and end."""

import os
from collections.abc import Callable, Iterator

from benchmarks.attacks import ESCAPE, Attack, World, among, edit

_FEW_CHARACTERS = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _talk(world: World) -> list[str]:
    """A chat that reads its questions from stdin."""
    return ["chat", "--adapter_path", str(world.run), "--max_new_tokens", "2"]


def _merge(world: World) -> list[str]:
    return ["merge", "--adapter_path", str(world.run), "--output_dir", str(world.folder / "merged")]


def _to_peft(world: World) -> list[str]:
    words = ["export", "--adapter_path", str(world.run), "--output_dir", str(world.folder / "peft"), "--to", "peft"]
    return [*words, "--for_class", "LlamaForCausalLM", "--no_certify"]


def _certify(world: World) -> list[str]:
    words = ["certify", "--adapter_path", str(world.run), "--engine", "in-process"]
    return [*words, "--prompts", "1", "--max_new_tokens", "2"]


def of_streams() -> Iterator[Attack]:
    """Kind 8: every stream closed, replaced or full, for commands that read or write much."""
    chats = {
        "{} <&-": (0,),
        "{} 0>/dev/null": (2,),
        "printf '\\xff\\xfe\\n' | {}": (2,),
        "head -c 300000 /dev/zero | {}": (0, 2),
    }
    for shell, codes in chats.items():
        yield Attack(8, f"a chat: {shell}", _talk, codes, shell=shell)
    for shell in ("{} >&-", "{} <&- >&- 2>&-"):
        yield Attack(8, f"a prompt: {shell}", lambda world: world.chat(), (0,), shell=shell)
    asked = "printf '\\xe4\\xbd\\xa0\\n' | {}"
    yield Attack(8, "a question in UTF-8 under C", _talk, (0,), _FEW_CHARACTERS, shell=asked)
    for name, words in (("merge", _merge), ("export", _to_peft), ("certify", _certify)):
        yield Attack(8, f"{name} >/dev/full", words, (3,), shell="{} >/dev/full 2>/dev/full")
    for columns in ("1", "abc", "99999999999999"):
        words = lambda world: world.inspect()  # noqa: E731
        yield Attack(8, f"COLUMNS={columns}", words, (0,), {"COLUMNS": columns}, shell="{} | tail -c 1000")


def of_names() -> Iterator[Attack]:
    """Kind 8: names whose bytes are not UTF-8, and names that the locale cannot print."""

    def renamed(part: str) -> Callable[[World], list[str]]:
        def words(world: World) -> list[str]:
            other = getattr(world, part).rename(world.folder / "caf\udce9")
            setattr(world, part, other)
            return world.train() if part == "base" else world.chat()

        return words

    yield Attack(8, "a base's name of no UTF-8", renamed("base"))
    yield Attack(8, "an adapter's name of no UTF-8", renamed("run"))
    for name, words in (("train", World.train), ("merge", _merge), ("export", _to_peft)):

        def into(world: World, words: Callable[[World], list[str]] = words) -> list[str]:
            return [*words(world), "--output_dir", str(world.folder / "caf\udce9")]

        yield Attack(8, f"{name} into a name of no UTF-8", into, (0, 2) if name == "export" else (2,))

    def records(world: World) -> list[str]:
        world.data = world.data.rename(world.folder / "caf\udce9.jsonl")
        return world.train()

    def chinese(world: World) -> list[str]:
        return world.train("--output_dir", world.folder / "灯")

    yield Attack(8, "records with a name of no UTF-8", records, (0,))
    yield Attack(8, "a Chinese name under C", chinese, (2,), _FEW_CHARACTERS, shell="{}")


def of_variables() -> Iterator[Attack]:
    """Kind 10: variables of Python, of libraries and of the system, and odd working folders."""
    yield from among(
        [
            ({"PYTHONOPTIMIZE": "2"}, (2,)),
            ({"PYTHONWARNINGS": "error"}, (0,)),
            ({"OMP_NUM_THREADS": "abc"}, (0,)),
            ({"CUDA_VISIBLE_DEVICES": "abc"}, (0,)),
            ({"TOKENIZERS_PARALLELISM": "maybe"}, (0,)),
            ({"HF_DATASETS_IN_MEMORY_MAX_SIZE": "abc"}, (2,)),
            ({"TMPDIR": "/dev/null/x"}, (0,)),
            ({"HOME": "/dev/null"}, (0, 2)),
            ({"TZ": "Nope/Zone", "LC_ALL": "zz_ZZ"}, (0,)),
            ({"MPLBACKEND": "TkAgg", "MPLCONFIGDIR": "/dev/null/x"}, (0,)),
        ]
    )
    gone = 'd=$(mktemp -d) && cd "$d" && rmdir "$d" && {}'
    for name, words in (("train", World.train), ("inspect", World.inspect), ("merge", _merge)):
        yield Attack(10, f"{name} in a folder that is gone", words, shell=gone)


def of_ends() -> Iterator[Attack]:
    """Kind 12: signals during imports, limits set by a shell, and odd things in place of an output folder."""
    for seconds in (0.4, 0.8, 1.2, 1.8, 2.4):
        shell = f"timeout --preserve-status -s INT {seconds} {{}} --max_steps 100000"
        yield Attack(12, f"SIGINT after {seconds} s", lambda world: world.train(), (75, 130), shell=shell)
    yield Attack(12, "ulimit -f: export", _to_peft, (3,), shell="ulimit -f 10; {}")
    yield Attack(12, "ulimit -f: merge", _merge, (3,), shell="ulimit -f 100; {}")
    yield Attack(12, "ulimit -n", _merge, (0, 2, 3), shell="ulimit -n 30; {}")
    for name in (".unfinished", ".lock"):

        def taken(world: World, name: str = name) -> list[str]:
            (world.folder / "out").mkdir()
            os.mkfifo(world.folder / "out" / name)
            return world.train()

        yield Attack(12, f"a pipe in the place of {name}", taken, (0, 2))

    def loop(world: World) -> list[str]:
        (world.folder / "merged").symlink_to(world.folder / "merged")
        return _merge(world)

    yield Attack(12, "an output folder that links to itself", loop)


def of_logs() -> Iterator[Attack]:
    """Kind 5: what a library logs about a base's config."""

    def config(world: World) -> list[str]:
        edit(world.base / "config.json", rope_scaling={"rope_type": ESCAPE})
        return world.train()

    yield Attack(5, "a library's warning", config)


MAKERS = (of_logs, of_streams, of_names, of_variables, of_ends)
