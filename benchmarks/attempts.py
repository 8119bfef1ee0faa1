"""Attempts: the attacks of kinds 1 to 13 (run by attacks.py)."""

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.attacks import ESCAPE, Attack, World, among, behind, edit, forked


def of_files() -> Iterator[Attack]:
    """Kind 1: altered files of a base and of an adapter."""
    altered: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("config.json", {"hidden_size": "32"}, (2,)),
        ("config.json", {"num_hidden_layers": 10**9}, (2,)),
        ("config.json", {"num_hidden_layers": 0}, (2,)),
        ("config.json", {"vocab_size": -1}, (2,)),
        ("config.json", {"hidden_size": 10**7}, (2,)),
        ("config.json", {"num_attention_heads": []}, (2,)),
        ("config.json", {"architectures": 5}, (2,)),
        ("config.json", {"num_labels": 10**9}, (2,)),
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
    for values in (
        *({"num_beams": 4}, {"stop_strings": ["x"]}, {"token_healing": True}, {"dola_layers": "high"}),
        *({"penalty_alpha": 0.6, "top_k": 4}, {"constraints": [1]}, {"force_words_ids": [[1]]}),
        *({"bad_words_ids": [[10**6]]}, {"sequence_bias": {"x": 1}}, {"cache_implementation": "quantized"}),
        {"output_scores": True, "return_dict_in_generate": True},
    ):

        def writing(world: World, values: dict[str, Any] = values) -> list[str]:
            edit(world.base / "generation_config.json", **values)
            return world.chat()

        yield Attack(1, f"chat with generation_config.json {values}", writing, (0,))
    yield from behind(1, "train", no_files(), (2,))
    yield from behind(1, "train", beside_a_base())
    yield from behind(1, "chat", beside_an_adapter())
    for name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        for content in ("", "[" * 200_000, "null"):

            def replaced(world: World, name: str = name, content: str = content) -> list[str]:
                (world.base / name).write_text(content)
                return world.train()

            yield Attack(1, f"{name} is {content[:5]!r}", replaced)


def no_files() -> dict[str, Callable[[World], object]]:
    """Things that have the name of a base's file but are not regular files."""
    weights = "model.safetensors"
    return {
        "a pipe of weights": lambda world: ((world.base / weights).unlink(), os.mkfifo(world.base / weights)),
        "weights without end": lambda world: (
            (world.base / weights).unlink(),
            (world.base / weights).symlink_to("/dev/zero"),
        ),
        "a template behind a broken link": lambda world: (world.base / "chat_template.jinja").symlink_to("blobs/0"),
        "a folder for a template": lambda world: (world.base / "chat_template.jinja").mkdir(),
    }


def beside_a_base() -> dict[str, Callable[[World], object]]:
    """Odd content in a base's files that some library still reads."""

    def text(world: World, change: Callable[[str], str]) -> None:
        file = world.base / "config.json"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    def adding(world: World, token_id: int, content: str) -> None:
        rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens = json.loads((world.base / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        tokens.append({"id": token_id, "content": content, "special": True, **rules})
        edit(world.base / "tokenizer.json", added_tokens=tokens)

    return {
        "config.json with a mark of its encoding": lambda world: text(world, lambda old: f"\ufeff{old}"),
        "config.json with a key twice": lambda world: text(world, lambda old: old.replace("{", '{"vocab_size": 7,', 1)),
        "config.json with NaN": lambda world: text(world, lambda old: old.replace("{", '{"rope_theta": NaN,', 1)),
        "a head of one number": lambda world: edit(world.base / "config.json", head_dim=1),
        "an attention nobody has": lambda world: edit(world.base / "config.json", attn_implementation="nope"),
        "weights of a kind nobody has": lambda world: edit(
            world.base / "config.json", quantization_config={"quant_method": "nope"}
        ),
        "a token beyond the vocabulary": lambda world: adding(world, 99_999, "<x>"),
        "a token of no text": lambda world: adding(world, 500, ""),
        "a token of a line end": lambda world: adding(world, 500, "\n"),
        "a token of a million letters": lambda world: adding(world, 500, "x" * 10**6),
        "a normalizer that writes a book for a letter": lambda world: edit(
            world.base / "tokenizer.json",
            normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000},
        ),
        "rules that double a letter forty times": lambda world: edit(
            world.base / "tokenizer.json",
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
            },
        ),
        "a rule that begins each text with a book": lambda world: edit(
            world.base / "tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 10**7}
        ),
        "an index of files that are not there": lambda world: (world.base / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "nope.safetensors"}}'
        ),
    }


def beside_an_adapter() -> dict[str, Callable[[World], object]]:
    """Odd adapter configs: slow regular expressions, and layers that do not exist."""
    values: list[dict[str, Any]] = [
        {"rank_pattern": {"(a|aa)+$": 4}},
        {"alpha_pattern": {"(": 4.0}},
        {"alpha_pattern": {"([a-z_.0-9]+)+!": 4.0}},
        {"exclude_modules": "(([a-z_.0-9]+)+)+!"},
        {"layers_to_transform": [999]},
        {"layer_replication": [[0, 10**9]]},
        {"trainable_token_indices": [10**9]},
        {"auto_mapping": {"parent_library": "os", "base_model_class": "x"}},
        {"base_model_name_or_path": "~nobody-here/x"},
        {"modules_to_save": ["lm_head"]},
    ]
    changes: dict[str, Callable[[World], object]] = {
        f"adapter_config.json {value}": lambda world, value=value: edit(world.run / "adapter_config.json", **value)
        for value in values
    }
    for value in ({"stop": ""}, {"max_seq_length": 10**18}, {"template_variables": {"raise_exception": 1}}):
        changes[f"atomtune.json {value}"] = lambda world, value=value: edit(world.run / "atomtune.json", **value)
    return changes


def of_templates() -> Iterator[Attack]:
    """Kind 2: chat templates that are endless, huge or forbidden, and slow patterns of a tokenizer."""
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
        "{% set ns = namespace(n=0) %}{% for i in range(10**5) %}{% for j in range(10**5) %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{% endfor %}",
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(40) }}",
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
    """Kind 3: flags and settings files of `train`."""
    flags = """--per_device_train_batch_size 0|--learning_rate nan|--learning_rate -1|--seed -1|--adam_beta1 2
--weight_decay inf|--lr_scheduler_type cosine_with_min_lr|--lr_scheduler_kwargs {|--metric_for_best_model bleu
--push_to_hub true|--dataloader_drop_last true --per_device_train_batch_size 1000|--lora_targets embed_tokens
--lora_targets nope|--lora_rank 1000000|--lora_dropout 1|--dataloader_num_workers 5000|--report_to nope|--optim lomo
--neftune_noise_alpha 1e300|--fsdp full_shard|--optim_args nonsense|--save_total_limit 0|--num_train_epochs 0
--max_seq_length 0|--gradient_accumulation_steps 0|--template /dev/zero|--eval_size -0.5|--max_minutes nan|--roles a
--keys a=b=c|--learning_rat 1|--deepspeed nope.json|--max_grad_norm -1|--max_steps 9999999999999999999999999999999
--accelerator_config nope.json|--debug underflow_overflow|--parallelism_config x|--log_level nope|--eval_on_start true
--log_level_replica 5|--dataloader_persistent_workers true|--train_sampling_strategy nope
--early_stopping_patience 2|--load_best_model_at_end true|--optim adafactor --optim_args x=1|--weight_decay 1e40
--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":1e400}"""
    for words in flags.replace("\n", "|").split("|"):
        yield Attack(3, words, lambda world, words=words: world.train(*words.split()))  # type: ignore[misc]
    files = {
        "a date that is none": "learning_rate: 2024-02-30\n",
        "nested deeply": "[" * 20_000,
        "a tag": "model_path: !!python/object/apply:os.system ['id']\n",
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "twice": "seed: 1\nseed: 2\n",
        "twice, deeper": "lr_scheduler_kwargs: {num_cycles: 1, num_cycles: 2}\nlr_scheduler_type: cosine\n",
        "no number, deeper": "lr_scheduler_kwargs: {num_cycles: .nan}\nlr_scheduler_type: cosine\n",
        "bytes": "\0\1",
    }
    for name, text in files.items():

        def yaml(world: World, text: str = text) -> list[str]:
            (world.folder / "r.yaml").write_text(text)
            return ["train", str(world.folder / "r.yaml"), *world.train()[1:]]

        yield Attack(3, f"YAML: {name}", yaml)
    yield from of_other_settings()
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


def of_other_settings() -> Iterator[Attack]:
    """Kind 3: flags of other commands, values that are no file name, and numbers that a library cannot use."""
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    for value in ("x", "[1]", deep, '{"enable_thinking": "false"}'):
        for command in ("train", "inspect"):
            yield Attack(
                3,
                f"{command} --chat_template_kwargs {value[:30]}",
                lambda world, command=command, value=value: getattr(world, command)("--chat_template_kwargs", value),
            )
    flags = """--num_train_epochs 1e308 --max_steps -1|--ddp_timeout 1000000000000000000|--mix 0.001
--lr_scheduler_kwargs {"power":NaN}|--resume_from_checkpoint ~nobody-here/x|--model_path ~nobody-here/x
--dataset_path *.jsonl|--resume_from_checkpoint /dev/null|--continue_training --checkpoint /dev/null"""
    for words in flags.replace("\n", "|").split("|"):
        yield Attack(3, words, lambda world, words=words: world.train(*words.split()))  # type: ignore[misc]
    run, sweep = ["--adapter_path", "RUN"], ["--model_path", "BASE", "--dataset_path", "DATA", "--output_dir", "OUT"]
    many = [word for name in ("lora_rank", "lora_alpha", "weight_decay") for word in ("--try", f"{name}=MANY")]
    commands = [
        ["chat", *run, "--prompt", "x", "--seed", "99999999999999999999"],
        ["evaluate", *run, "--dataset_path", "DATA", "--chat_template_kwargs", "x"],
        ["sweep", *sweep, "--try", "{x"],
        ["sweep", *sweep, *many],
        ["sweep", *sweep, "--hub_token", "secret"],
        ["runs", "RUN", "RUN", "--plot", "OUT.doc"],
        ["runs", "RUN", "RUN", "--plot", "/proc/x.png"],
        ["web", *run, "--host", "a..b", "--password", "x"],
        ["serve", *run, "--host", "192.0.2.1", "--no_certify"],
        ["certify", *run, "--served", "DATA.gguf"],
        ["inspect", "DATA", "--model_path", "BASE", "--html", "/proc/x.html"],
    ]
    yield Attack(3, "--temperature 1e-300", lambda world: world.chat("--temperature", "1e-300"), (0,))
    for command in commands:

        def of_world(world: World, command: list[str] = command) -> list[str]:
            shutil.copy(world.data, f"{world.data}.gguf")
            places = {"RUN": world.run, "BASE": world.base, "DATA": world.data, "OUT": world.folder / "out"}
            places["MANY"] = Path(",".join(map(str, range(1, 101))))
            for place, path in places.items():
                command = [word.replace(place, str(path)) for word in command]
            return command

        yield Attack(3, " ".join(command), of_world, (2,))
    for name in ("output_dir", "dataset_path", "template"):
        for character in ("\\0", "\\ud800"):

            def yaml(world: World, name: str = name, character: str = character) -> list[str]:
                (world.folder / "r.yaml").write_text(f'{name}: "a{character}b"\n')
                words = world.train()[1:]
                if f"--{name}" in words:
                    at = words.index(f"--{name}")
                    words = words[:at] + words[at + 2 :]
                return ["train", str(world.folder / "r.yaml"), *words]

            yield Attack(3, f"YAML: {name} with {character}", yaml)


def of_cache() -> Iterator[Attack]:
    """Kind 4: a damaged cache. An undisturbed inspect fills it first."""

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
    """Kind 5: control characters in everything that may be printed."""
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
    """Kind 6: links from a run's folder to `others`, a folder with a file that must not change."""
    for name in (".saving-adapter", ".unfinished", "checkpoint-2", ".saving-checkpoint-2", "adapter_model.safetensors"):

        def link(world: World, name: str = name) -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                (world.run / name).unlink()
            (world.run / name).symlink_to(world.folder / "others")
            return world.resume()

        yield Attack(6, f"a link {name}", link, (0, 2, 3))

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

    def over_a_project(world: World) -> list[str]:
        (world.folder / "others" / "README.md").write_text("mine")
        return world.train("--output_dir", world.folder / "others")

    def over_a_base(world: World) -> list[str]:
        shutil.copytree(world.base, world.folder / "others" / "base")
        return world.train("--output_dir", world.folder / "others" / "base")

    def among_records(world: World) -> list[str]:
        (world.folder / "data").mkdir()
        world.data = Path(shutil.move(world.data, world.folder / "data")).parent
        return world.train("--output_dir", world.data / "out")

    def stopped(world: World) -> list[str]:
        return world.train("--hub_token", "secret", "--max_steps", "100", "--max_minutes", "0.001")

    yield Attack(6, "a run over a base", over_a_base)
    yield Attack(6, "a run over a project", over_a_project)
    yield Attack(6, "a password in an address", lambda world: world.train("--dataset_path", "https://u:secret@x.y/z"))
    yield Attack(6, "a run among its records", among_records)
    yield Attack(6, "a token in a stopped run", stopped, (75,))
    yield Attack(6, "a page over a pipe", page)
    yield Attack(6, "an index that leads out", index)
    yield Attack(6, "a card of broken YAML", card, (0,))
    yield Attack(
        6, "a password in HF_ENDPOINT", lambda world: ["chat", "--adapter_path", "no/such", "--prompt", "x"], (2,),
        {"HF_ENDPOINT": "http://user:secret@127.0.0.1:9"},
    )  # fmt: skip


def of_sizes() -> Iterator[Attack]:
    """Kind 7: very large records and values."""
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
    """Kind 8: closed, full and broken streams."""
    for shell, codes in {
        "{} >&-": (0, 3),
        "{} >/dev/full": (3,),
        "{} | head -c 1": (0,),
        "{} 2>&-": (0,),
        "{} </dev/null >&- 2>&-": (0, 3),
    }.items():
        yield Attack(8, shell, lambda world: world.inspect(), codes, shell=shell)
    # Only the printed report shows success, so grep decides about the exit code.
    yield Attack(8, "COLUMNS=0", lambda world: world.inspect(), (0,), {"COLUMNS": "0"}, shell="{} | grep -q tokens")
    for variables in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ):
        for more in ((), ("--json",)):
            words = lambda world, more=more: world.inspect(*more)  # noqa: E731
            yield Attack(8, f"{variables} {' '.join(more)}", words, (0,), variables, shell="{}")


def of_bases() -> Iterator[Attack]:
    """Kind 9: folders and models that are no usable base."""

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
        **{f"{name} by its config": kind_of(name) for name in ("t5", "bert", "vit", "musicgen", "nope")},
    }
    for name, folder in bases.items():
        yield Attack(9, name, given(folder))


def of_environment() -> Iterator[Attack]:
    """Kind 10: variables of distributed launchers and of libraries."""
    yield from among(
        [
            ({"WORLD_SIZE": "4"}, (2,)),
            ({"RANK": "2"}, (2,)),
            ({"LOCAL_RANK": "0"}, (2,)),
            ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, (2,)),
            ({"PMI_SIZE": "4"}, (2,)),
            ({"OMPI_COMM_WORLD_SIZE": "many"}, (2,)),
            ({"ACCELERATE_TORCH_DEVICE": "meta"}, (2,)),
            ({"ACCELERATE_USE_CPU": "maybe"}, (2,)),
            ({"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, (2,)),
            ({"HF_DATASETS_CACHE": "/dev/null/x"}, (2,)),
            ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, (0,)),
            ({"ATOMTUNE_OUTPUT_DIR": "/nowhere"}, (0,)),
        ]
    )


def of_resume() -> Iterator[Attack]:
    """Kind 11: resume after a change of the base, the data, a setting or the run's files."""
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
    yield from of_records_of_runs()
    for name in ("checkpoint-²", "checkpoint-007", "checkpoint-x", "checkpoint-99999999999999999999"):

        def named(world: World, name: str = name) -> list[str]:
            (world.run / name).mkdir()
            return world.resume()

        yield Attack(11, f"a folder {name}", named, (0,))


def of_records_of_runs() -> Iterator[Attack]:
    """Kind 11: the run's own records, as other programs may leave them."""
    states: list[dict[str, Any]] = [
        {"log_history": [{"loss": 1.0}]},
        {"log_history": [{"loss": "low", "step": 1}]},
        {"stateful_callbacks": {"WorkCounter": {"attributes": {"add": 5}}}},
        {"best_global_step": 99},
        {"global_step": 10**9},
    ]
    for state in states:

        def resumed(world: World, state: dict[str, Any] = state) -> list[str]:
            checkpoint = next(world.run.glob("checkpoint-*"))
            edit(checkpoint / "trainer_state.json", **state)
            (checkpoint / "manifest.json").unlink()
            words = [word for word in world.resume() if word != "--resume"]
            return [*words, "--resume_from_checkpoint", str(checkpoint)]

        yield Attack(11, f"trainer_state.json {state}", resumed, (0, 2))
    records: list[dict[str, Any]] = [
        {"settings": [1]},
        {"settings": {"dataset_path": {"value": 5}}},
        {"loss_history": [{}]},
        {"loss_history": 5},
        {"samples": 5},
        {"started": 5, "status": [], "steps": 1e300},
    ]
    for record in records:
        for command in ("runs", "evaluate"):

            def read(world: World, record: dict[str, Any] = record, command: str = command) -> list[str]:
                edit(world.run / "run.json", **record)
                flags = ["--records", "2", "--no_generate", "--no_probe", "--adapter_path"]
                return [command, *(flags if command == "evaluate" else [str(world.run)]), str(world.run)]

            yield Attack(11, f"{command}: run.json {record}", read, (0, 2))
    trial = {"number": 1, "settings": {}, "status": "finished", "eval_loss": "low", "eval_history": []}
    for sweep in ({"tried": []}, {"trials": [5]}, {"trials": [trial]}):

        def swept(world: World, sweep: dict[str, Any] = sweep) -> list[str]:
            (world.folder / "out").mkdir()
            values = {"status": "stopped", "shared": {}, "tried": {"lora_rank": ["8"]}, "trials": [], **sweep}
            (world.folder / "out" / "sweep.json").write_text(json.dumps(values))
            return ["sweep", *world.train()[1:7], "--try", "lora_rank=8", "--resume"]

        yield Attack(11, f"sweep.json {sweep}", swept)


def of_stops() -> Iterator[Attack]:
    """Kind 12: limits and signals. benchmarks/reliability.py kills runs at every point of a save."""

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
    """Kind 13: extreme numbers."""
    flags = {
        "--learning_rate 1e30 --max_steps 4": (0, 3),
        "--lora_alpha 1e38 --max_steps 3": (2,),
        "--lora_alpha 1e6 --max_steps 3": (0, 3),
        "--max_grad_norm 1e-300 --max_steps 2": (0, 3),
        "--adam_epsilon 1e-300 --max_steps 2": (0, 3),
        "--gradient_accumulation_steps 3 --per_device_train_batch_size 2 --max_steps 2": (0,),
        "--dtype float16": (0, 3),
    }
    for words, codes in flags.items():
        yield Attack(13, words, lambda world, words=words: world.train(*words.split()), codes)  # type: ignore[misc]


MAKERS = (
    of_files,
    of_templates,
    of_settings,
    of_cache,
    of_words,
    of_links,
    of_sizes,
    of_streams,
    of_bases,
    of_environment,
    of_resume,
    of_stops,
    of_numbers,
)
