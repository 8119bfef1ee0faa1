"""Attacks from outside, by kind: altered files, hostile templates, settings, records, streams, links and variables.

    python -m benchmarks.attacks                 all of them, as a table
    python -m benchmarks.attacks --kinds 1 3     some of the kinds

Every attack is a command of atomtune's in a process of its own. It fails where it ends in a traceback or by a signal,
with an exit code that does not fit, after more than 10 seconds of processor time, with a control character on the
terminal, or with something changed that is not its own.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import resource
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
}
MOST_SECONDS = 10  # of processor time
_HANGS = 300  # by the clock, on a machine that others use too
#: What a terminal would obey. Tabs and line ends are laid out by it, and nothing else.
_ORDERS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")
_BUG = re.compile(rb"Traceback \(most recent|this is a bug")
ESCAPE = "\x1b[31mX\x9b2J"


@dataclass
class World:
    """What an attack works on: copies that are its own."""

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

    def records(self, *values: Any, name: str = "attack.jsonl") -> None:
        self.data = self.folder / name
        lines = (value if isinstance(value, str) else json.dumps(value) for value in values)
        self.data.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Attack:
    """One attempt: what is done to the world, the command, and how it may end.

    unharmed  of the folder, what must be as it was
    """

    kind: int
    name: str
    words: Callable[[World], list[str]]
    codes: tuple[int, ...] = (2,)
    variables: dict[str, str] = field(default_factory=dict)
    shell: str = ""  # around the command, where its streams are attacked
    unharmed: tuple[str, ...] = ()


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def of_files() -> Iterator[Attack]:
    """Kind 1."""
    altered: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("config.json", {"hidden_size": "32"}, (2,)),
        ("config.json", {"num_hidden_layers": 10**9}, (2,)),
        ("config.json", {"num_hidden_layers": 0}, (2,)),
        ("config.json", {"vocab_size": -1}, (2,)),
        ("config.json", {"hidden_size": 10**7}, (2,)),
        ("config.json", {"num_attention_heads": []}, (2,)),
        ("config.json", {"architectures": 5}, (2,)),
        ("config.json", {"dtype": "float99"}, (2,)),
        ("generation_config.json", {"temperature": "x"}, (2,)),
        ("generation_config.json", {"max_length": -5}, (2,)),
        ("generation_config.json", {"eos_token_id": {}}, (2,)),
        ("tokenizer_config.json", {"chat_template": 5}, (2,)),
        ("tokenizer_config.json", {"model_max_length": "x"}, (2,)),
        ("tokenizer.json", {"model": {}}, (2,)),
        ("tokenizer.json", {"added_tokens": 5}, (2,)),
    ]
    for name, values, codes in altered:

        def base(world: World, name: str = name, values: dict[str, Any] = values) -> list[str]:
            edit(world.base / name, **values)
            return world.train()

        yield Attack(1, f"{name} {values}", base, codes)
    adapters: list[dict[str, Any]] = [
        {"r": None},
        {"r": 10**9},
        {"target_modules": "(a|aa)+$"},
        {"target_modules": "("},
        {"lora_alpha": "x"},
        {"peft_type": "NOPE"},
        {"init_lora_weights": ""},
        {"base_model_name_or_path": 5},
        {"rank_pattern": {"q_proj": 0}},
    ]
    for values in adapters:

        def adapter(world: World, values: dict[str, Any] = values) -> list[str]:
            edit(world.run / "adapter_config.json", **values)
            return world.chat()

        yield Attack(1, f"adapter_config.json {values}", adapter)
    for name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        for content in ("", "[" * 200_000, "null"):

            def replaced(world: World, name: str = name, content: str = content) -> list[str]:
                (world.base / name).write_text(content)
                return world.train()

            yield Attack(1, f"{name} is {content[:5]!r}", replaced)


def of_templates() -> Iterator[Attack]:
    """Kind 2."""
    sources = [
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ 'a' * 300000000 }}",
        "{{ 1 / 0 }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 2 ** 10000000000 }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content | indent(10000000000) }}",
        "{% if",
    ]
    for source in sources:

        def written(world: World, source: str = source) -> list[str]:
            (world.folder / "t.jinja").write_text(source)
            return world.inspect("--template", world.folder / "t.jinja")

        yield Attack(2, source, written)
    for pattern in ("(a|aa|a?)+$", "a*a*b", r"\s*\s*z"):

        def pre_tokenized(world: World, pattern: str = pattern) -> list[str]:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            edit(world.base / "tokenizer.json", pre_tokenizer=split)
            world.records(*[{"instruction": "a" * 30_000, "output": "b"}] * 2)
            return world.train()

        yield Attack(2, f"pattern {pattern}", pre_tokenized)


def of_settings() -> Iterator[Attack]:
    """Kind 3."""
    flags = """--per_device_train_batch_size 0|--learning_rate nan|--learning_rate -1|--seed -1|--adam_beta1 2
--weight_decay inf|--lr_scheduler_type cosine_with_min_lr|--lr_scheduler_kwargs {|--metric_for_best_model bleu
--push_to_hub true|--dataloader_drop_last true --per_device_train_batch_size 1000|--lora_targets embed_tokens
--lora_targets nope|--lora_rank 1000000|--lora_dropout 1|--dataloader_num_workers 5000|--report_to nope|--optim lomo
--neftune_noise_alpha 1e300|--fsdp full_shard|--optim_args nonsense|--save_total_limit 0|--num_train_epochs 0
--max_seq_length 0|--gradient_accumulation_steps 0|--template /dev/zero|--eval_size -0.5|--max_minutes nan|--roles a
--keys a=b=c|--learning_rat 1|--deepspeed nope.json|--max_grad_norm -1"""
    for words in flags.replace("\n", "|").split("|"):
        yield Attack(3, words, lambda world, words=words: world.train(*words.split()))  # type: ignore[misc]
    files = {
        "a date that is none": "learning_rate: 2024-02-30\n",
        "nested deeply": "[" * 20_000,
        "a tag": "model_path: !!python/object/apply:os.system ['id']\n",
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "twice": "seed: 1\nseed: 2\n",
        "bytes": "\0\1",
    }
    for name, text in files.items():

        def yaml(world: World, text: str = text) -> list[str]:
            (world.folder / "r.yaml").write_text(text)
            return ["train", str(world.folder / "r.yaml"), *world.train()[1:]]

        yield Attack(3, f"YAML: {name}", yaml)
    for command in (
        ["evaluate", "--output_dir", "/dev/null"],
        ["evaluate", "TWICE"],
        ["merge", "--output_dir", "/dev/null"],
    ):

        def of_run(world: World, command: list[str] = command) -> list[str]:
            adapters = [str(world.run)] * (2 if "TWICE" in command else 1)
            rest = [word for word in command[1:] if word != "TWICE"]
            data = ["--dataset_path", str(world.data)] if command[0] == "evaluate" else []
            return [command[0], "--adapter_path", *adapters, *data, *rest]

        yield Attack(3, " ".join(command), of_run)


def of_cache() -> Iterator[Attack]:
    """Kind 4: the cache is filled by an undisturbed inspect first."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    damages: dict[str, Callable[[Path], object]] = {
        "a flipped bit": flip,
        "an empty file": lambda file: file.write_bytes(b""),
        "no file": lambda file: file.unlink(),
        "half a file": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "a folder": lambda file: (file.unlink(), file.mkdir()),
        "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    }
    for file_name in ("examples.arrow", "ledger.json", "checksums.json"):
        for name, damage in damages.items():

            def damaged(
                world: World, file_name: str = file_name, damage: Callable[[Path], object] = damage
            ) -> list[str]:
                forked(world.inspect("--json"), world.folder / "first")
                for entry in (world.folder / "cache" / "atomtune").iterdir():
                    damage(entry / file_name)
                return world.inspect("--json")

            yield Attack(4, f"{file_name}: {name}", damaged, (0,))


def of_words() -> Iterator[Attack]:
    """Kind 5."""
    values: dict[str, Any] = {
        "a key": {ESCAPE: "v"},
        "a role": {"messages": [{"role": ESCAPE, "content": "x"}]},
        "a second key": {"instruction": "a", "output": "b", ESCAPE: 1},
        "a text": {"instruction": ESCAPE, "output": ESCAPE},
        "a tool": {"messages": [{"role": "user", "content": "x", ESCAPE: [ESCAPE]}]},
    }
    for name, value in values.items():
        for more in ((), ("--json",)):

            def record(world: World, value: Any = value, more: tuple[str, ...] = more) -> list[str]:
                world.records(value, value)
                return world.inspect(*more)

            yield Attack(5, f"{name} {' '.join(more)}", record, (0, 2))

    def file_name(world: World) -> list[str]:
        shutil.copy(world.data, world.folder / f"{ESCAPE}.jsonl")
        world.data = world.folder / f"{ESCAPE}.jsonl"
        return world.inspect()

    def header(world: World) -> list[str]:
        world.data = world.folder / "a.csv"
        world.data.write_text(f"{ESCAPE},output\na,b\n")
        return world.inspect()

    def template(world: World) -> list[str]:
        (world.folder / "t.jinja").write_text("{{ raise_exception('" + ESCAPE + "') }}")
        return world.inspect("--template", world.folder / "t.jinja")

    def record_of_run(world: World) -> list[str]:
        edit(world.run / "run.json", status=ESCAPE, reason=ESCAPE)
        return ["runs", str(world.run)]

    def metadata(world: World) -> list[str]:
        edit(world.run / "atomtune.json", instruction=ESCAPE)
        return world.chat()

    for name, words in {
        "a file's name": file_name,
        "a CSV header": header,
        "a template's error": template,
        "run.json": record_of_run,
        "an instruction": metadata,
    }.items():
        yield Attack(5, name, words, (0, 2))
    yield Attack(5, "a flag", lambda world: world.train(f"--{ESCAPE}", "1"))
    yield Attack(5, "a command", lambda world: [ESCAPE])


def of_links() -> Iterator[Attack]:
    """Kind 6: `others` holds a file and stands beside."""
    for name in (".saving-adapter", ".unfinished", "checkpoint-2", ".saving-checkpoint-2", "adapter_model.safetensors"):

        def link(world: World, name: str = name) -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                (world.run / name).unlink()
            (world.run / name).symlink_to(world.folder / "others")
            return world.resume()

        yield Attack(6, f"a link {name}", link, (0, 2, 3), unharmed=("others",))

    def page(world: World) -> list[str]:
        os.mkfifo(world.folder / "others" / "pipe")
        return world.inspect("--html", world.folder / "others" / "pipe")

    def index(world: World) -> list[str]:
        (world.base / "model.safetensors").rename(world.folder / "model.safetensors")
        (world.base / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}})
        )
        return world.train()

    def card(world: World) -> list[str]:
        (world.base / "README.md").write_text("---\ndate: 2024-02-30\nx: " + "[" * 100_000 + "\n---")
        return world.train()

    yield Attack(6, "a page over a pipe", page)
    yield Attack(6, "an index that leads out", index)
    yield Attack(6, "a card of broken YAML", card, (0,))
    yield Attack(
        6, "a password in HF_ENDPOINT", lambda world: ["chat", "--adapter_path", "no/such", "--prompt", "x"], (2,),
        {"HF_ENDPOINT": "http://user:secret@127.0.0.1:9"},
    )  # fmt: skip


def of_sizes() -> Iterator[Attack]:
    """Kind 7."""
    wide = {f"k{number}": number for number in range(200_000)}
    roles = ["user", "assistant"]
    values: dict[str, Any] = {
        "200,000 keys": {**wide, "instruction": "q", "output": "a"},
        "4,000 turns": {"messages": [{"role": roles[n % 2], "content": "x"} for n in range(4000)]},
        "200,000 control strings": {"instruction": "</s>" * 200_000, "output": "a"},
        "nested 100,000 deep": '{"instruction": ' + "[" * 100_000 + "]" * 100_000 + ', "output": "a"}',
        "a line of 15 MB": {"instruction": "q", "output": "word " * 3_000_000},
        "a number of 100,000 digits": '{"instruction": "q", "output": "a", "n": ' + "9" * 100_000 + "}",
        "300,000 marks on a letter": {"instruction": "e" + "\u0301" * 300_000, "output": "a"},
    }
    for name, value in values.items():

        def record(world: World, value: Any = value) -> list[str]:
            world.records(value)
            return world.inspect()

        yield Attack(7, name, record, (0, 2))

    def bomb(world: World) -> list[str]:
        world.data = world.folder / "bomb.jsonl.gz"
        with gzip.open(world.data, "wb") as file:
            for _ in range(300):
                file.write(b"x" * 2**20)
        return world.inspect()

    def columns(world: World) -> list[str]:
        world.data = world.folder / "wide.csv"
        world.data.write_text("\n".join(",".join(f"c{n}" for n in range(100_000)) for _ in range(2)))
        return world.inspect()

    yield Attack(7, "300 MB in a small .gz", bomb, (0, 2))
    yield Attack(7, "100,000 columns", columns, (0, 2))


def of_streams() -> Iterator[Attack]:
    """Kind 8."""
    for shell, codes in {
        "{} >&-": (0, 3),
        "{} >/dev/full": (3,),
        "{} | head -c 1": (0,),
        "{} 2>&-": (0,),
        "{} </dev/null >&- 2>&-": (0, 3),
    }.items():
        yield Attack(8, shell, lambda world: world.inspect(), codes, shell=shell)
    for variables in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ):
        for more in ((), ("--json",)):
            words = lambda world, more=more: world.inspect(*more)  # noqa: E731
            yield Attack(8, f"{variables} {' '.join(more)}", words, (0,), variables, shell="{}")


def of_bases() -> Iterator[Attack]:
    """Kind 9."""

    def given(folder: Callable[[World], Path]) -> Callable[[World], list[str]]:
        def words(world: World) -> list[str]:
            world.base = folder(world)
            return world.train()

        return words

    def kind_of(name: str) -> Callable[[World], Path]:
        def altered(world: World) -> Path:
            edit(world.base / "config.json", model_type=name, architectures=None)
            return world.base

        return altered

    def pointer(world: World) -> Path:
        (world.base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        return world.base

    def empty(world: World) -> Path:
        (world.folder / "empty").mkdir()
        return world.folder / "empty"

    def gguf(world: World) -> Path:
        (empty(world) / "x.gguf").write_bytes(b"GGUF")
        return world.folder / "empty"

    def fewer_rows(world: World) -> Path:
        edit(world.base / "config.json", vocab_size=10)
        return world.base

    bases: dict[str, Callable[[World], Path]] = {
        "an adapter": lambda world: world.run,
        "a checkpoint": lambda world: next(world.run.glob("checkpoint-*")),
        "a git-lfs pointer": pointer,
        "an empty folder": empty,
        "a GGUF": gguf,
        "fewer rows than tokens": fewer_rows,
        **{f"{name} by its config": kind_of(name) for name in ("t5", "bert", "vit", "nope")},
    }
    for name, folder in bases.items():
        yield Attack(9, name, given(folder))


def of_environment() -> Iterator[Attack]:
    """Kind 10."""
    cases: list[tuple[dict[str, str], tuple[int, ...]]] = [
        ({"WORLD_SIZE": "4"}, (2,)),
        ({"RANK": "2"}, (2,)),
        ({"LOCAL_RANK": "0"}, (2,)),
        ({"PMI_SIZE": "4"}, (2,)),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, (2,)),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, (2,)),
        ({"ACCELERATE_USE_CPU": "maybe"}, (2,)),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, (2,)),
        ({"HF_DATASETS_CACHE": "/dev/null/x"}, (2,)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, (0,)),
        ({"ATOMTUNE_OUTPUT_DIR": "/nowhere"}, (0,)),
    ]
    for variables, codes in cases:
        yield Attack(10, str(variables), lambda world: world.train(), codes, variables, shell="{}")


def of_resume() -> Iterator[Attack]:
    """Kind 11."""
    for name, value in {"rms_norm_eps": 1e-3, "hidden_act": "gelu", "max_position_embeddings": 64}.items():

        def config(world: World, name: str = name, value: Any = value) -> list[str]:
            edit(world.base / "config.json", **{name: value})
            return world.resume()

        yield Attack(11, f"config.json {name}", config)

    def weights(world: World) -> list[str]:
        file = world.base / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return world.resume()

    def records(world: World) -> list[str]:
        lines = world.data.read_text(encoding="utf-8").splitlines(keepends=True)
        world.data.write_text("".join(reversed(lines)), encoding="utf-8")
        return world.resume()

    yield Attack(11, "the last bit of the weights", weights)
    yield Attack(11, "the records in another order", records)
    yield Attack(11, "another seed", lambda world: world.resume("--seed", 1))
    for place in ("run.json", "manifest.json"):
        for name in ("a pipe", "/dev/zero", "nested", "a folder"):

            def spoiled(world: World, place: str = place, name: str = name) -> list[str]:
                checkpoint = next(world.run.glob("checkpoint-*"))
                file = (world.run if place == "run.json" else checkpoint) / place
                file.unlink()
                if name == "a pipe":
                    os.mkfifo(file)
                elif name == "/dev/zero":
                    file.symlink_to("/dev/zero")
                elif name == "nested":
                    file.write_text('{"a":' * 100_000)
                else:
                    file.mkdir()
                return world.resume()

            yield Attack(11, f"{place}: {name}", spoiled, (0, 2))
    for name in ("checkpoint-²", "checkpoint-007", "checkpoint-x", "checkpoint-99999999999999999999"):

        def named(world: World, name: str = name) -> list[str]:
            (world.run / name).mkdir()
            return world.resume()

        yield Attack(11, f"a folder {name}", named, (0,))


def of_stops() -> Iterator[Attack]:
    """Kind 12; kills at every point of a save stand in the first table."""

    def limited(kilobytes: int) -> Attack:
        return Attack(
            12, f"ulimit -f {kilobytes}", lambda world: world.train(), (3,), shell=f"ulimit -f {kilobytes}; {{}}"
        )

    yield from (limited(kilobytes) for kilobytes in (1, 16, 64))
    for name in ("TERM", "HUP", "INT"):
        shell = f"timeout -s {name} 6 {{}} --max_steps 100000 || [ $? -eq 124 ]"
        yield Attack(12, f"SIG{name}", lambda world: world.train(), (0,), shell=shell)
    yield Attack(12, "an output folder under a file", lambda world: world.train("--output_dir", world.data / "x"))


def of_numbers() -> Iterator[Attack]:
    """Kind 13."""
    flags = {
        "--learning_rate 1e30 --max_steps 4": (0, 3),
        "--lora_alpha 1e38 --max_steps 3": (0, 3),
        "--max_grad_norm 1e-300 --max_steps 2": (0, 3),
        "--adam_epsilon 1e-300 --max_steps 2": (0, 3),
        "--gradient_accumulation_steps 3 --per_device_train_batch_size 2 --max_steps 2": (0,),
        "--dtype float16": (0, 3),
    }
    for words, codes in flags.items():
        yield Attack(13, words, lambda world, words=words: world.train(*words.split()), codes)  # type: ignore[misc]


def attacks() -> list[Attack]:
    makers = (of_files, of_templates, of_settings, of_cache, of_words, of_links, of_sizes, of_streams, of_bases)
    more = (of_environment, of_resume, of_stops, of_numbers)
    return [attack for make in (*makers, *more) for attack in make()]


def forked(words: list[str], output: Path, variables: dict[str, str] | None = None) -> tuple[int, float]:
    """A command in a child of this process, which has imported everything: exit code, and seconds of processor time."""
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
    """A command as a shell starts it."""
    import shlex

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
    """What is wrong with how an attack ended; "" where nothing is."""
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
    # A process that a shell starts imports torch first, and one that is stopped computes until then.
    if seconds > MOST_SECONDS * (3 if attack.shell else 1):
        problems.append(f"{seconds:.0f} s")
    if sorted(path.name for path in others.iterdir()) != before or (others / "mine").read_text() != "mine":
        problems.append("something of others is changed")
    return "; ".join(problems)


def table(kinds: list[int]) -> list[str]:
    """Every attack, and a row for each kind; what fails is printed on the way."""
    import atomtune.export.merge
    import atomtune.inspect.command
    import atomtune.serve.chat
    import atomtune.train.run  # noqa: F401  # once, before the forks

    persona = Path(__file__).parent.parent / "src" / "atomtune" / "demo" / "persona.jsonl"
    tried, failed = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        records = workloads.read(persona, 40)
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
