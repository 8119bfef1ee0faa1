"""The command line accepts what the pages tell users to type; each command is read as a user would type it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from atomtune.cli import COMMANDS
from atomtune.errors import BadSettings
from atomtune.settings.help import EXAMPLES
from atomtune.settings.read import GROUPS, read

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: A command between backticks in a sentence; it may contain a line end.
INLINE = re.compile(r"(?<!`)`(atomtune [^`]+)`(?!`)")
#: Settings that a page leaves out with `…`.
LEFT_OUT = {
    **{command: {"model_path": "BASE", "dataset_path": "DATA"} for command in ("train", "plan", "sweep", "verify")},
    **{command: {"adapter_path": "OUT"} for command in ("chat", "certify", "serve", "web", "evaluate")},
    **{command: {"adapter_path": "OUT", "output_dir": "NEW"} for command in ("merge", "export")},
    "inspect": {"dataset_path": "DATA", "model_path": "BASE"},
}


def commands_of(page: Path) -> Iterator[tuple[str, bool]]:
    """Every command line of a page, and whether it is complete; a command between backticks may be a part of one.

    Lines that end in a backslash are joined.
    """
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line.strip(), "…" not in line.partition(" #")[0]
    for command in INLINE.findall(text):
        yield " ".join(command.split()), False


def words_of(line: str) -> list[str]:
    """The words of a line without its comment, pipes and redirections."""
    words = shlex.split(line, comments=True)
    end = next((at for at, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";", "&")), len(words))
    return words[:end]


LINES = [(page.relative_to(ROOT).as_posix(), line, whole) for page in PAGES for line, whole in commands_of(page)]
LINES += [
    ("--help", f"atomtune {command} {example}", True) for command, examples in EXAMPLES.items() for example in examples
]
#: `atomtune COMMAND` and `[--setting value …]` only show the form of commands.
OURS = [entry for entry in LINES if entry[1].startswith("atomtune ") and not re.search(r" \[|COMMAND", entry[1])]


def refusal(words: list[str], *, whole: bool = True) -> str | None:
    """Why the command line refuses `atomtune WORDS`; None if it accepts them. Parts of commands are completed first."""
    if not words or words[0] in ("--help", "--version", "help"):
        return None
    command, *flags = words
    if command not in COMMANDS:
        return f"there is no command {command!r}"
    if "--help" in flags:
        return None
    if not whole and not any(flag.endswith(".yaml") for flag in flags):
        names = {flag[2:].partition("=")[0] for flag in flags}
        paths = command == "inspect" and flags and not flags[0].startswith("--")
        for name, value in LEFT_OUT.get(command, {}).items():
            if name not in names and not (paths and name == "dataset_path"):
                flags += [f"--{name}", value]
    flags = [flag for flag in flags if flag != "…"]
    try:
        read(command, flags)
    except BadSettings as error:
        return str(error)
    return None


def wrong_next_steps(screen: str) -> list[str]:
    """Why the command line refuses commands below `Next:`, each read as it would be copied; empty if it accepts all."""
    lines = [line for line in screen.partition("Next:\n")[2].splitlines() if line.startswith("  ")]
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [words[words.index("atomtune") + 1 :] for words in commands if "atomtune" in words]
    assert ours, f"no next step in: {screen}"
    return [problem for words in ours if (problem := refusal(words))]


@pytest.fixture
def in_the_project(monkeypatch, tmp_path):
    """Work in the project's folder, with files for the settings and runs that a page only names."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text("model_path: BASE\ndataset_path: DATA\n")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run.json").write_text('{"settings": {}}')

    def at_hand(word: str) -> str:
        if word == "output":
            return str(tmp_path / word)
        is_named_only = word.endswith(".yaml") and not (ROOT / word).is_file()
        return str(tmp_path / "run.yaml") if is_named_only else word

    return at_hand


@pytest.mark.parametrize(("page", "line", "whole"), OURS, ids=[f"{page}: {line}"[:90] for page, line, _ in OURS])
def test_the_command_line_accepts_every_documented_command(page, line, whole, in_the_project):
    words = [in_the_project(word) for word in words_of(line)[1:]]
    assert refusal(words, whole=whole) is None, f"{page} says: {line}"


def test_the_docs_contain_commands_and_wrong_ones_are_detected():
    assert len(OURS) > 60 and {page for page, _, _ in OURS} >= {
        "README.md",
        "README.zh-CN.md",
        "docs/guide.md",
        "SKILL.md",
    }
    assert "Did you mean" in str(refusal(["chat", "--adapter_pth", "output"]))
    assert "expected one of" in str(refusal(["export", "--adapter_path", "a", "--output_dir", "b", "--quantize", "q3"]))
    assert "no command" in str(refusal(["trian"]))


def test_the_guide_shows_every_command_in_both_languages():
    for page in ("docs/guide.md", "docs/guide.zh-CN.md"):
        named = {words_of(line)[1] for where, line, _ in OURS if where == page and len(words_of(line)) > 1}
        assert named >= COMMANDS.keys() - {"runs"}, f"{page} does not show {COMMANDS.keys() - named}"


def test_docs_in_both_languages_show_the_same_commands():
    for page in ("README", "docs/guide", "docs/data"):
        english = [" ".join(words_of(line)) for line, _ in commands_of(ROOT / f"{page}.md")]
        chinese = [" ".join(words_of(line)) for line, _ in commands_of(ROOT / f"{page}.zh-CN.md")]
        assert sorted(english) == sorted(chinese)


def test_make_targets_and_extras_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(
        re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.MULTILINE
        )
    )
    for page, line, _ in LINES:
        words = words_of(line)
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{page}: {line}"
        if words[:2] == ["pip", "install"] and "[" in line:
            assert set(re.search(r"\[(.+?)\]", line)[1].split(",")) <= extras, f"{page}: {line}"
        if words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            outside = words[2] in ("venv", "pip", "pytest", "atomtune")
            assert outside or module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), (
                f"{page}: {line}"
            )


def test_pages_and_make_name_the_versions_of_python_that_are_allowed():
    oldest, beyond = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ).groups()
    versions = (f"3.{oldest}", f"3.{int(beyond) - 1}")
    for page in ("README.md", "README.zh-CN.md", "Makefile"):
        named = re.findall(r"Python (3\.\d+) (?:to|到) (3\.\d+)", (ROOT / page).read_text(encoding="utf-8"))
        assert named and set(named) == {versions}, page
    assert f"(3, {oldest}) <= sys.version_info < (3, {beyond})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_settings_are_defined_for_exactly_the_existing_commands():
    assert GROUPS.keys() == COMMANDS.keys()
