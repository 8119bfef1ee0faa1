"""The map in CONTRIBUTING.md is what a real run does; `make house` writes it again."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.test_house import name, written_files
from tools.house.map import stated, tree, walks_text
from tools.house.source import Source
from tools.house.walks import Walk, between, take_walks

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "atomtune"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: Libraries that decide which of our functions are called; the map is written with the versions in constraints.txt.
CALLERS = ("accelerate", "datasets", "jinja2", "peft", "tokenizers", "torch", "transformers")


def test_the_tree_in_contributing_has_every_file_and_its_first_sentence():
    lines, today = stated(PAGE)[0].splitlines(), tree(Source(SOURCE)).splitlines()
    assert lines == today, "run `make house`"


@pytest.mark.slow
def test_the_walks_in_contributing_are_up_to_date(tmp_path):
    constraints = dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    for library in CALLERS:
        if version(library).partition("+")[0] != constraints[library].partition("+")[0]:
            pytest.skip(f"{library} {version(library)} is not the version that the walks were taken with")
    lines, source = stated(PAGE)[1].splitlines(), Source(SOURCE)
    today = walks_text(take_walks(source, tmp_path)).splitlines()
    assert lines == today, "run `make house`"


@pytest.fixture
def small(tmp_path):
    """Three files in two folders."""
    for file, text in {
        "top.py": "def start():\n    return 1\n",
        "room/first.py": "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n",
        "room/second.py": "def h():\n    x = 1\n    return x\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    return Source(tmp_path)


def test_a_walk_counts_each_function_once_and_each_return(small):
    f, g, h, start = ("room/first.py", "A.f"), ("room/first.py", "A.g"), ("room/second.py", "h"), ("top.py", "start")
    walk = Walk("record", small, (f, h, f, start, g, h))
    assert walk.functions == [f, h, start, g]
    assert walk.files == {"room/first.py": ["A.f", "A.g"], "room/second.py": ["h"], "top.py": ["start"]}
    assert walk.file_lines() == 6 + 3 + 2
    assert walk.function_lines() == 2 + 3 + 2 + 2
    assert walk.returns() == 1  # to first.py, for A.g
    assert walk.rooms == ["room", "top.py"]


def test_a_walk_is_cut_between_two_landmarks(small):
    entries = [("a.py", name) for name in ("x", "C.begin", "y", "end", "begin", "end")]
    assert between(entries, "begin", "end") == entries[1:3]
    with pytest.raises(SystemExit, match="no function nowhere was entered"):
        between(entries, "nowhere", "end")


#: Files of other projects that our texts mention.
FOREIGN = {"training_args.py", "run.py"}


@pytest.mark.parametrize("path", written_files(), ids=name)
def test_every_python_file_named_in_the_texts_exists(path):
    # `data/cache.py`, `tests/walk/test_faults.py`: after a file moves, texts may still have its old name.
    folders = [ROOT / folder for folder in ("src", "tests", "tools", "benchmarks", "examples")]
    files = {p.relative_to(ROOT).as_posix() for folder in folders for p in folder.rglob("*.py")}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for named in re.findall(r"(?<![\w/.<>{}-])[a-z_][\w/]*\.py\b", line):
            known = any(f"/{file}".endswith(f"/{named}") for file in files) or named in FOREIGN
            assert known, f"{name(path)}:{number} names {named}, which is not there"
