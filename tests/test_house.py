"""Rules of the project: which module may import which, and what files must not contain."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import constraints
from tools.house.signs import private_names_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "atomtune"
FILES = sorted(SOURCE.rglob("*.py"))
#: All that may be at the top of the repository.
TOP = {
    *(".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "README.zh-CN.md"),
    *("SKILL.md", "benchmarks", "constraints.txt", "docs", "examples", "pyproject.toml", "src", "tests", "tools"),
}
#: Layers of packages and top-level modules: each may import only from the layers above it.
FLOORS = (
    ("catalogue",),
    ("errors", "choices", "language", "process", "shared_prefix", "container"),
    ("console", "durations"),
    ("disk", "limits", "extras", "hub_reach"),
    ("folders",),
    ("settings",),
    ("data", "engines", "pages"),
    ("analysis", "batch"),
    ("model",),
    ("verify", "inspect", "evaluate", "runs", "own_loop", "sweep"),
    ("certify",),
    ("export", "serve"),
    ("train",),
    ("plan", "program_state"),  # a plan uses what the run would choose for settings on auto
    ("cli", "api"),
    ("__main__", "__init__"),
)
#: Packages that get plain values and must not import the settings.
PLAIN = ("data", "analysis", "batch", "model")


def module_of(path: Path) -> str:
    """The module of a path: src/atomtune/data/cache.py is atomtune.data.cache."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions; `from a import b` counts as a.b if that is a module."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which room it enters"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                modules.add(whole if whole in MODULES else node.module)
    return modules


def rooms_read(source: str) -> set[str]:
    """Packages whose files a module reads: `resources.files("atomtune.evaluate")`, `rendered("evaluate", …)`."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function, argument = ast.unparse(node.func).split(".")[-1], str(node.args[0].value)
            if function == "files" and argument.startswith("atomtune."):
                rooms.add(argument.split(".")[1])
            elif function == "rendered":
                rooms.add(argument)
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_the_repository_root_has_only_known_entries():
    # A test once wrote a model of 4 MB there, and a commit included it.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in listed.stdout.split("\0") if path} <= TOP


def test_every_package_has_a_layer():
    assert {room_of(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    room = room_of(path)
    entered = {module.split(".")[1] for module in imports_of(path) if module.startswith("atomtune.")}
    entered = (entered | rooms_read(path.read_text(encoding="utf-8"))) - {room}
    assert {other for other in entered if FLOOR[other] >= FLOOR[room]} == set()
    if room in PLAIN:
        assert "settings" not in entered


def test_reading_a_file_of_another_package_is_detected():
    # The pages once read a style sheet of evaluate, which was a layer below them.
    source = "from importlib import resources\nstyle = resources.files('atomtune.evaluate') / 'html' / 'page.css'\n"
    assert rooms_read(source) == {"evaluate"}
    assert rooms_read("rendered('sweep', 'sweep.html.jinja')") == {"sweep"}
    assert rooms_read("def rendered(room):\n    return resources.files(f'atomtune.{room}')\n") == set()


def test_there_are_no_circular_imports():
    graph = {module: imports_of(path) & MODULES.keys() for module, path in MODULES.items()}
    while leaves := {module for module, wants in graph.items() if not wants & graph.keys()}:
        graph = {module: wants for module, wants in graph.items() if module not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "data"], ids=name)
def test_data_is_handed_its_tokenizer_and_imports_no_torch(path):
    assert not {module.split(".")[0] for module in imports_of(path)} & {"torch", "transformers", "peft", "accelerate"}


LIGHT = ("catalogue", "errors", "choices", "language", "console", "settings", "cli")


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in LIGHT], ids=name)
def test_modules_that_handle_flags_import_no_torch(path):
    # Imports at any depth of a function count too; test_cli.py checks real processes.
    assert not {module.split(".")[0] for module in imports_of(path)} & {"torch", "transformers", "peft", "datasets"}


def test_the_row_module_imports_no_torch_or_numpy():
    assert not {module.split(".")[0] for module in imports_of(SOURCE / "batch" / "row.py")} & {"torch", "numpy"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_module_names_are_specific_and_modules_have_docstrings(path):
    assert not re.search(r"util|manager|helper|common|misc", path.stem)
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


#: Private names of libraries, which may change with a release. Before adding one, say beside its
#: use why there is no public name.
PRIVATE = {
    "model/agreement.py": {"inner.config._attn_implementation"},
    "model/attention_in_use.py": {"config._attn_implementation", "config._attn_implementation_internal"},
    "model/block_attention.py": {"torch._softmax_backward_data"},
    "model/fused_lora.py": {"weight._version"},
    "model/fused_norm.py": {"torch.ops.aten._weight_norm_interface_backward"},
    "model/layout_support.py": {"inner.config._attn_implementation"},
    "model/load.py": {"torch.ops.mkldnn._is_mkldnn_bf16_supported"},
    "model/loss.py": {"twin._modules"},
    "model/span_attention.py": {
        "torch.ops.aten._flash_attention_backward",
        "torch.ops.aten._flash_attention_forward",
    },
    "model/step_graphs.py": {"module._parameters"},
    "train/arguments.py": {"args._n_gpu"},
    "train/checkpoint/saving_trainer.py": {
        "Trainer._finalize_training",
        "Trainer._load_best_model",
        "Trainer._load_from_checkpoint",
        "Trainer._load_optimizer_and_scheduler",
        "Trainer._save_checkpoint",
        "Trainer._save_optimizer_and_scheduler",
        "Trainer._save_rng_state",
        "Trainer._save_scaler",
    },
    "train/dataloader.py": {"Queue._on_queue_feeder_error"},
    "train/trainer.py": {
        "Trainer._clip_grad_norm",
        "Trainer._determine_best_metric",
        "Trainer._evaluate",
        "Trainer._get_train_sampler",
        "Trainer._load_best_model",
        "Trainer._track_num_input_tokens",
    },
}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_new_private_name_of_a_library(path):
    known = PRIVATE.get(path.relative_to(SOURCE).as_posix(), set())
    assert private_names_of(ast.parse(path.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_signature_is_typed(path):
    # mypy checks the types themselves; this check works without mypy in every environment.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{name(path)}:{node.lineno} {node.name}"
            assert node.returns is not None, f"{place} returns what?"
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert all(p.annotation or p.arg in ("self", "cls") for p in parameters), f"{place} takes what?"


def written_files() -> list[Path]:
    """All files that a user may read: source, documents, the root; not the tests, which name what they look for."""
    kinds = {".py", ".md", ".jinja", ".yaml", ".toml", ".sh", ".json", ".jsonl", ".cfg", ".txt", ""}
    folders = [ROOT / folder for folder in ("src", "docs", "examples", "tools", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    caches = re.compile(r"\.|__pycache__$")  # .ruff_cache and similar folders
    return sorted(
        path
        for path in files
        if path.is_file()
        and path.suffix in kinds
        and not any(caches.match(part) for part in path.relative_to(ROOT).parts)
    )


@pytest.mark.parametrize("path", written_files(), ids=name)
def test_no_path_of_one_machine_is_written_down(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = re.search(r"(?<![\w.~-])/(work|root|tmp|home|Users)\b", line)
        assert not match, f"{name(path)}:{number} says {match.group()}"


def headings_and_blocks(path: Path) -> tuple[list[int], int]:
    """The level of each heading and the number of code blocks; a # inside a block is a comment."""
    levels, fences = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fences += 1
        elif fences % 2 == 0 and (heading := re.match(r"(#+) ", line)):
            levels.append(len(heading.group(1)))
    return levels, fences


@pytest.mark.parametrize("page", ["README", "docs/guide", "docs/data"])
def test_a_page_has_the_same_parts_in_both_languages(page):
    # A part that is missing in one language was usually forgotten.
    english, chinese = ROOT / f"{page}.md", ROOT / f"{page}.zh-CN.md"
    assert headings_and_blocks(chinese) == headings_and_blocks(english)


@pytest.mark.parametrize("path", [p for p in written_files() if p.suffix == ".md"], ids=name)
def test_every_code_block_ends(path):
    assert headings_and_blocks(path)[1] % 2 == 0


@pytest.mark.parametrize("page", [p for p in written_files() if p.suffix == ".md"], ids=name)
def test_every_link_within_the_project_leads_somewhere(page):
    # Regression: a heading of the README was renamed, and two links to it led nowhere.
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `flag`, and more\n")
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](#here) [b](#there) [c](other.md#a-flag-and-more) [d](other.md#b) [e](none.md)\n")
    assert broken_links(page) == ["#there", "other.md#b", "none.md"]


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that do not exist; links to the web are not followed."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        is_there = target.exists() and (not heading or heading in _headings(target))
        if not is_there:
            broken.append(link)
    return broken


def _headings(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings: small letters, no marks, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in written_files() if p.suffix == ".md"], ids=name)
def test_every_pytest_command_in_a_page_selects_tests(page):
    # Regression: tests were moved and renamed, and six commands of docs/reliability.md selected nothing.
    assert commands_without_tests(page, ROOT) == []


def test_a_pytest_command_that_selects_nothing_is_found(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a_disk_is_full(): ...\n")
    page = tmp_path / "page.md"
    page.write_text(
        "`pytest test_it.py -k 'disk or full'` `pytest test_it.py -k 'disk or link'` `pytest gone.py` `-k a`\n"
    )
    assert commands_without_tests(page, tmp_path) == ["pytest test_it.py -k 'disk or link'", "pytest gone.py", "-k a"]


def commands_without_tests(page: Path, root: Path) -> list[str]:
    """Commands `pytest FILES -k WORDS` in a page where a file is gone, or a word is in none of the tests' names."""
    empty = []
    for command in re.findall(r"`((?:pytest |-k )[^`]*)`", page.read_text(encoding="utf-8")):
        files, _, words = command.removeprefix("pytest ").partition("-k ")
        paths = [root / file for file in files.split() if not file.startswith("-")]
        if not paths or not all(path.exists() for path in paths):
            empty.append(command)
            continue
        sources = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
        names = [test for file in sources for test in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))]
        wanted = set(re.findall(r"\w+", words)) - {"or", "and", "not"}
        if not all(any(word in test for test in names) for word in wanted):
            empty.append(command)
    return empty


def test_tests_mirror_the_source():
    # tests/data/reading/test_hub.py tests src/atomtune/data/reading/hub.py; tests across packages are in tests/walk.
    tests = ROOT / "tests"
    mirrors = [path for path in tests.rglob("test_*.py") if path.parts[len(tests.parts)] != "walk"]
    about_the_project = {"test_house.py", "test_map.py", "test_benchmarks.py"}
    for path in mirrors:
        source = SOURCE / path.relative_to(tests).with_name(path.name.removeprefix("test_"))
        assert source.exists() or path.name in about_the_project, f"{path} tests no file of the source"


def test_the_tested_versions_lie_in_the_ranges():
    requirements = {name: Requirement(text.partition("#")[0]) for name, text in constraints.requirements().items()}
    pins = [line for line in constraints.FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert pins
    for name, version in (pin.split("==") for pin in pins):
        assert version in requirements[name].specifier, f"{name}: tested with {version}, allowed {requirements[name]}"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("dependencies = [")[2].partition("\n]")[0]
    needed = set(re.findall(r'"([a-z0-9_.-]+)', project))
    assert needed == {pin.split("==")[0] for pin in pins} & needed, "a dependency has no tested version"
