"""Mutated files of a model, an adapter and a run are named in an error within seconds, and never misread.

`make fuzz` uses ten thousand of each. The oracle is simpler than any schema: an accepted file is a JSON object in which
every value has the same type as before, or is null.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atomtune.data.encoding.choose_template import load_template
from atomtune.engines.served_folder import ServedFolder
from atomtune.engines.vllm_serve import ServedAdapter
from atomtune.errors import AtomtuneError, BadData
from atomtune.evaluate.run_folder import refuse_changed_files, run_records
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import AdapterMetadata, base_of, template_of
from atomtune.model.generate import answer_ids, ready_to_answer
from atomtune.model.load import BaseSpec, load_base, load_tokenizer, quiet_libraries
from atomtune.model.token_rows import guard_embedding
from atomtune.train.checkpoint.start import step_of

#: Alterations per file.
ALTERED = int(os.environ.get("ATOMTUNE_FUZZ", "27"))
MOST_SECONDS = 10
CPU = torch.device("cpu")

#: Values that ended in a traceback or never ended.
HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1, 3, 7, 10**9, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "32", "x", "\x1b[31m", "(a|aa)+$", "(", "../../etc", "float99", "😀" * 50),
    *([], [1], ["x"], [[]], [None], {}, {"x": 1}, {"": []}, {"type": "x"}),
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to three changes, in most cases of values, otherwise of bytes."""
    if draw.random() < 0.75:
        values = json.loads(content)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            change_a_value(values, draw)
        return json.dumps(values).encode()
    changed = bytearray(content)
    kind = draw.randrange(6)
    at = draw.randrange(len(changed))
    if kind == 0:
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        del changed[at : at + draw.randint(1, 30)]
    elif kind == 3:
        changed[at:at] = draw.choice([b'"', b"{", b"}", b"]", b",", b"\0", b"\xff", b"[" * 5000, b"9" * 5000])
    elif kind == 4:
        changed = bytearray(draw.choice([b"", b"null", b"[]", b"1", b'"x"', b"[" * 200_000, b'{"a":' * 200_000]))
    else:
        changed = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return bytes(changed)


def change_a_value(values: Any, draw: random.Random) -> None:
    """Change one value at any depth: replace it, remove it, or rename its key."""
    places: list[tuple[Any, Any]] = []
    # Otherwise a vocabulary would get nearly all changes.
    todo = [values]
    while todo:
        parent = todo.pop()
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        for key in keys[:40]:
            places.append((parent, key))
            if isinstance(parent[key], dict | list):
                todo.append(parent[key])
    if not places:
        return
    parent, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif kind == 2:
        parent[key] = [parent[key]]
    elif kind == 3:
        parent[key] = {"x": parent[key]}
    else:
        parent[key] = copy.deepcopy(draw.choice(HOSTILE))


def kind_of(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def other_kinds(before: Any, after: Any, place: str = "") -> list[str]:
    """The places where a value has another type than before."""
    if before is None or after is None:
        return []
    if kind_of(before) != kind_of(after):
        return [place]
    if isinstance(before, dict):
        found: list[str] = []
        for key in before.keys() & after:
            found += other_kinds(before[key], after[key], f"{place}.{key}")
        return found
    return []


def use_base(folder: Path) -> None:
    """Use a base like chat and training do: the tokenizer, its template, the model, one answer."""
    tokenizer = load_tokenizer(str(folder))
    template = load_template("auto", tokenizer)
    base = load_base(BaseSpec(path=str(folder), dtype=torch.float32, device=CPU))
    guard_embedding(base, tokenizer, path=str(folder))
    ready_to_answer(base, template, notice=lambda text: None)
    answer_ids(base, template, [{"role": "user", "content": "?"}], max_new_tokens=2)


def use_adapter(folder: Path) -> None:
    template_of(folder, trust_remote_code=False)
    load_trained(load_base(BaseSpec(path=base_of(folder, None), dtype=torch.float32, device=CPU)), folder)
    use_engines(folder)


def use_metadata(folder: Path) -> None:
    assert AdapterMetadata.load(folder) is not None
    template_of(folder, trust_remote_code=False)


def use_record(folder: Path) -> None:
    run_records(folder)
    with contextlib.suppress(BadData):  # refused if the hash is another text
        refuse_changed_files(folder, "")


def use_engines(folder: Path) -> None:
    """Use the folder like the start of vLLM and of `transformers serve`."""
    ServedAdapter("a", folder).rank()
    with ServedFolder(folder, stop_ids=[2]):
        pass


def use_state(folder: Path) -> None:
    step_of(folder)


#: File → (the folder it belongs to, the function that uses the folder).
KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config.json": ("base", use_base),
    "generation_config.json": ("base", use_base),
    "tokenizer.json": ("base", use_base),
    "tokenizer_config.json": ("base", use_base),
    "model.safetensors.index.json": ("shards", use_base),
    "adapter_config.json": ("adapter", use_adapter),
    "atomtune.json": ("adapter", use_metadata),
    "run.json": ("adapter", use_record),
    "trainer_state.json": ("checkpoint", use_state),
}
#: Keys that atomtune does not read, that may have several types, or that only the tokenizers library reads.
FREE = {
    *("transformers_version", "_from_model_config", "architectures", "pretraining_tp", "metadata", "peft_version"),
    *("dtype", "bos_token_id", "eos_token_id", "use_cache", "model_max_length", "tokenizer_class", "chat_template"),
    "settings",  # a number may be written as text there, as on the command line
    *("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "auto_mapping", "revision", "backend"),
}


@pytest.fixture(scope="module")
def folders(models, by_heart, tmp_path_factory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    shards = tmp_path_factory.mktemp("shards")
    shutil.copytree(models("llama"), shards, dirs_exist_ok=True)
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(models("llama")).save_pretrained(shards, max_shard_size="100KB")
    checkpoint = next(by_heart.glob("checkpoint-*"))
    return {"base": models("llama"), "shards": shards, "adapter": by_heart, "checkpoint": checkpoint}


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Interrupt what never ends, so that it is reported."""

    def ring(number: int, frame: object) -> None:
        raise KeyboardInterrupt("a file took longer than it may")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", KINDS)
def test_mutated_model_files_are_accepted_or_refused_without_a_crash(folders, tmp_path, name):
    quiet_libraries()
    kind, use = KINDS[name]
    draw = random.Random(name)
    folder = tmp_path / "copy"
    shutil.copytree(folders[kind], folder, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt", "*.pth", "*.png"))
    whole = (folders[kind] / name).read_bytes()
    if name == "run.json":  # what other commands read from it
        values = json.loads(whole)
        read = {"settings": values["settings"], "records_held_out": ["data.jsonl:1", "data.jsonl:2"]}
        whole = json.dumps({**read, "data": {"sha256": values["data"]["sha256"]}}).encode()
    accepted, slowest = 0, 0.0
    for number in range(ALTERED):
        content = mutated(whole, draw)
        (folder / name).write_bytes(content)
        began = time.monotonic()
        signal.alarm(4 * MOST_SECONDS)  # processors are shared: stop what never ends, report what is slow
        try:
            use(folder)
            accepted += 1
            changed = other_kinds(json.loads(whole), json.loads(content))
            assert not [place for place in changed if place.split(".")[1] not in FREE], (number, changed, content[:500])
        except AtomtuneError as error:
            assert error.exit_code == 2, (number, error)
            # The last two are about a base that the file names.
            named = (str(folder), "template", "no folder here has this name", "Pass --model_path with", "Repo id")
            assert any(words in str(error) for words in named), (number, str(error))
        except BaseException as error:
            raise AssertionError((number, repr(error)[:300], content[:1500])) from error
        finally:
            signal.alarm(0)
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        assert seconds < MOST_SECONDS, (number, content[:500])
    print(f"{name}: {ALTERED:,} altered, {accepted:,} accepted, the others refused by name; slowest {slowest:.1f} s")
    assert accepted, "of so many changes some do no harm"
