"""The guide's section from nothing to a served model, run line by line as it is written, on a real small model.

To save time, the records are a sixth of the reader's, and the numbers in `SHORTER` and `FASTER` are smaller.
"""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.walk.test_pages import ROOT, words_of

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SECTION = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## 13. ")[2]
COMMANDS = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
CLIENT = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]
PORT = "8000"
FEW_PROMPTS = ["--prompts", "3"]
#: Command → flags that make it faster. The probe asks a real model as many questions as a tiny one.
FASTER = {
    "train": ["--per_device_train_batch_size", "2"],
    "evaluate": ["--no_probe"],
    "certify": FEW_PROMPTS,
    "export": FEW_PROMPTS,
    "serve": FEW_PROMPTS,
}
#: Flag → a number that still shows that the line works: answers change and certificates hold after a few steps.
SHORTER = {"--max_steps": "4", "--records": "3", "--max_new_tokens": "16"}


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done


def shorter(words: list[str]) -> list[str]:
    """The words of a line with smaller numbers."""
    fewer = [SHORTER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return [*fewer, *FASTER.get(words[0], [])]


def test_every_documented_command_up_to_a_served_model_runs(real, tmp_path):
    openai = pytest.importorskip("openai", reason="needs the extra serve")
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    from atomtune.engines.server_process import free_port

    base, port = str(real("smollm2")), str(free_port())
    records = (ROOT / "src" / "atomtune" / "demo" / "persona.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "persona.jsonl").write_text("\n".join(records[::6]) + "\n", encoding="utf-8")
    atomtune = [sys.executable, "-m", "atomtune"]
    printed = {}
    *lines, last = [line for line in COMMANDS if line.startswith("atomtune ")]
    assert len(lines) + 4 == len(COMMANDS), "two lines install, one copies the records, and all others are run here"
    for line in lines:
        words = [base if word == BASE else word for word in words_of(line)[1:]]
        began = time.monotonic()
        printed[words[0]] = run([*atomtune, *shorter(words)], tmp_path).stdout
        print(f"{time.monotonic() - began:4.0f} s  {line}")
    assert printed["chat"].strip()
    for file in ("records.html", "lamp/evaluation/report.html", "lamp-merged/model.safetensors", "lamp-gguf/Modelfile"):
        assert (tmp_path / file).is_file(), file

    server = subprocess.Popen(
        [*atomtune, *shorter(words_of(last)[1:]), "--port", port], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in server.stdout:
            if line.startswith("ready: "):
                break
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Who are you?"}]
        reply = client.chat.completions.create(model="lamp-bf16", messages=messages, temperature=0, max_tokens=60)
        assert reply.choices[0].message.content.strip()
        if _is_installed("langchain_openai"):
            asked = run([sys.executable, "-c", CLIENT.replace(PORT, port)], tmp_path)
            assert asked.stdout.strip() == reply.choices[0].message.content.strip()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 75)


def _is_installed(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
