"""The guide's commands outside section 13, run as written, in their order, in one folder, on tiny models.

Tiny models replace the published bases of their families, and the numbers in `SHORTER` are smaller.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import numbered_dialogues, write_jsonl
from tests.walk.test_pages import BLOCK, ROOT, words_of

pytestmark = pytest.mark.slow

BEFORE, _, REST = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## 13. ")
BEHIND = REST.partition("## 14. ")[2]
LINES = [
    line
    for block in BLOCK.findall(BEFORE + BEHIND)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("atomtune ") and not {"…", "["} & set(line.partition(" #")[0])
]
BASES = {
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen2.5-7B-Instruct": "qwen3",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "FlagAlpha/Atom-7B-Chat": "llama",
}
#: Flags that are added to a command so that it takes seconds.
SHORTER = {
    "train": ["--max_steps", "2"],
    "sweep": ["--max_steps", "2"],
    "evaluate": ["--max_new_tokens", "4"],
    "chat": ["--max_new_tokens", "4"],
    "certify": ["--prompts", "2", "--dtype", "float32"],
    "serve": ["--prompts", "2", "--dtype", "float32"],
}
WAITS = ("serve", "web")
#: A word of a line → the module without which the line is skipped.
NEEDS = {"nf4": "bitsandbytes", "vllm": "vllm", "--trials": "optuna", "export": "xllamacpp", "web": "gradio"}
NEEDS |= {"serve": "uvicorn", "certify": "uvicorn"}


def is_missing(words: list[str]) -> str:
    """The module that these words need and that is missing; "" if none is."""
    for word in words:
        module = NEEDS.get(word)
        if module and importlib.util.find_spec(module) is None:
            return module
    return ""


def shortened(words: list[str], models) -> list[str]:
    """The words with tiny models and smaller numbers."""
    named = [str(models(BASES[word])) if word in BASES else word for word in words]
    if "examples/atom-7b.yaml" in words:  # the file names its own base and records
        own = [] if "--dataset_path" in words else ["--dataset_path", "persona.jsonl"]
        named += ["--model_path", str(models("llama")), "--eval_size", "0.1", *own]
    if "--trials" in named:
        named[named.index("--trials") + 1] = "2"
    return [*named, *SHORTER.get(words[0], [])]


def run(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "BROWSER": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "atomtune", *words]
    if words[0] in WAITS:
        started_and_stopped(command, folder, environment)
        return
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"


def started_and_stopped(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    from atomtune.engines.server_process import free_port

    command += ["--port", str(free_port())]
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    for line in server.stdout:
        said += line
        if line.startswith("ready: "):
            break
    server.send_signal(signal.SIGINT)
    said += server.communicate()[0]
    assert server.returncode == 0, f"{command}\n{said}"


def test_every_command_of_the_guide_runs(models, tmp_path):
    assert len(LINES) > 20
    records = [{**one, "input": f"{one['input']}{n}"} for n in range(2) for one in numbered_dialogues()]
    write_jsonl(tmp_path / "persona.jsonl", records)  # some are held out, because there are at least 50
    thinking = [{**one, "output": f"<think>\nhm\n</think>\n\n{one['output']}"} for one in records]
    write_jsonl(tmp_path / "thoughts.jsonl", thinking)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    left_out = []
    for line in LINES:
        words = words_of(line)[1:]
        if module := is_missing(words):
            left_out.append(f"{line}: no {module}")
            continue
        if words[0] in ("train", "sweep", "merge", "export") and "--output_dir" in words:
            # The same command for another base: otherwise the folder would be refused, because it has a run.
            shutil.rmtree(tmp_path / words[words.index("--output_dir") + 1], ignore_errors=True)
        run(shortened(words, models), tmp_path)
    print("\n".join(left_out))
