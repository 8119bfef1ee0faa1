"""Fixtures: real, tiny models and tokenizers, built in this process; nothing is downloaded."""

import gc
import json
import os
import signal
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ATOMTUNE_LANGUAGE"] = "en"  # whatever the machine's locale is
# The tests expect a CPU's results bit by bit. `CUDA_VISIBLE_DEVICES=0 pytest …` uses a GPU; see docs/log.md.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# `nohup make test &` makes child processes ignore these signals. A run respects that, so tests of stops would fail.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "huanhuan.jsonl"

#: Our own short dialogues: two languages, some inputs, punctuation, digits, a newline.
DIALOGUES = [
    {"instruction": "你是谁？", "input": "", "output": "我是灯塔的看守人。"},
    {"instruction": "Who are you?", "input": "", "output": "I keep the light."},
    {"instruction": "把这句话翻译成英文", "input": "早上好", "output": "Good morning."},
    {"instruction": "今天天气怎么样？", "input": "", "output": "有雾，\n看不见对岸。"},
    {"instruction": "Add the numbers.", "input": "2 + 3", "output": "5"},
    {"instruction": "讲一个很短的故事", "input": "", "output": "从前有一座山，山上有一盏灯，灯下有一个人在读书。"},
    {"instruction": "请用一句话介绍你住的地方。", "input": "", "output": "一座小岛，三间屋子，许多海鸥。"},
    {"instruction": "晚安", "input": "", "output": "晚安，愿你好梦。"},
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write records to a JSONL file."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def shell_words(text: str) -> list[str]:
    """The arguments that a shell makes of a part of a command."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def numbered_dialogues() -> list[dict]:
    """DIALOGUES five times, made different by numbers: 40 records."""
    return [{**record, "instruction": f"{record['instruction']} ({n})"} for n in range(5) for record in DIALOGUES]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """An empty working directory, for commands with relative paths: a user may have a folder `merged` in a checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An example store for the tests, separate from the user's, also in processes that tests start."""
    import datasets

    folder = tmp_path_factory.mktemp("store")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder
    yield


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """DIALOGUES five times with numbers, as a JSONL file of 40 records."""
    return write_jsonl(tmp_path / "dialogues.jsonl", numbered_dialogues())


def pytest_collection_finish() -> None:
    """Take what is imported by now out of Python's search for garbage, which each run of the Trainer starts anew."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use real material as slow: `make test` skips them, `make test-slow` runs them."""
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """`real("smollm2")`, `real("tok/qwen3")`: a folder of tools/real_material.py; skips the test if it is missing."""
    root = Path(os.environ.get("ATOMTUNE_REAL") or Path.home() / ".cache" / "atomtune-real")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{root / name} is not there: python tools/real_material.py")
        return root / name

    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models("llama")` is the folder of a tiny model of that family with a tokenizer, built once per session."""
    from tests.tiny import build

    shorten_runs()

    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return folder


def shorten_runs() -> None:
    """Leave out what takes most of a short run in this process, and what tests of its own look at: its end.

    Untrained models answer up to the limit, so samples are short, and only the first run's picture is drawn.
    """
    from atomtune.disk import replacing
    from atomtune.train import progress, samples

    samples.LONGEST_ANSWER = 8
    draw, drawn = progress.draw_loss, []

    def draw_once(history: list[dict], path: Path, *, title: str = "") -> None:
        if drawn:
            with replacing(path) as file:
                file.write(drawn[0])
        else:
            draw(history, path, title=title)
            drawn.append(path.read_bytes())

    progress.draw_loss = draw_once


@pytest.fixture
def one_base_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A load by verify or train fails if an earlier base is still in memory; the list gets a reference to each base."""
    from atomtune import verify
    from atomtune.model.load import load_base
    from atomtune.train import model as train_model

    loaded: list[Any] = []

    def watched(spec: Any) -> Any:
        assert [base() for base in loaded] == [None] * len(loaded)
        base = load_base(spec)
        loaded.append(weakref.ref(base))
        return base

    for module in (verify, train_model):
        monkeypatch.setattr(module, "load_base", watched)
    gc.disable()  # Python's own collections come by chance
    yield loaded
    gc.enable()


@pytest.fixture(scope="session")
def by_heart(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an adapter on the tiny llama that has memorized DIALOGUES."""
    from tests.trained import train_by_heart

    return train_by_heart(models("llama"), tmp_path_factory.mktemp("by_heart"), DIALOGUES)


@pytest.fixture(scope="session")
def trained_in_nf4(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, run): the run trained on the base in 4 bits and held out two records."""
    pytest.importorskip("bitsandbytes")
    from atomtune.cli import main

    folder = tmp_path_factory.mktemp("nf4")
    data = write_jsonl(folder / "data.jsonl", DIALOGUES)
    flags = ["--quantize", "nf4", "--dtype", "float32", "--max_steps", "4", "--learning_rate", "1e-2"]
    files = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(folder / "out")]
    assert main(["train", *files, *flags, "--eval_size", "2"]) == 0
    return models("llama"), folder / "out"
