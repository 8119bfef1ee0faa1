"""The benchmarks run on a toy model: every installed contender, each in its own process."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig

from atomtune.model.lora_targets import all_linear
from benchmarks import __main__ as bench
from benchmarks import (
    defaults,
    families,
    gpu,
    gpu_meter,
    gpu_workloads,
    metamath,
    quality,
    questions,
    replay,
    side_by_side,
    tiny_configs,
    workloads,
)
from benchmarks.contender import lora, plain_model
from benchmarks.side_by_side import Run

ROOT = Path(__file__).parents[1]
PERSONA = ROOT / "src" / "atomtune" / "demo" / "persona.jsonl"
TRL = importlib.util.find_spec("trl") is not None


@pytest.mark.slow
def test_a_toy_run_ends_in_a_table_and_a_figure(tmp_path):
    contenders = ["tutorial", *(["trl-packed-bf16"] if TRL else []), "atomtune-fp32", "atomtune-bf16"]
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--shape",
        "toy",
        "--records",
        "64",
        "--rounds",
        "1",
        "--workloads",
        "style",
    ]
    done = subprocess.run(
        [*command, "--contenders", *contenders, "--out", str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["name"] for run in runs] == contenders
    # All start with the same weights and see the same records, so their losses are close.
    assert max(run["loss"] for run in runs) - min(run["loss"] for run in runs) < 0.05
    shared = next(run for run in runs if run["name"] == "atomtune-bf16")
    assert shared["layout"] == "tree"
    assert shared["computed_tokens"] < runs[0]["computed_tokens"] / 2
    assert "| atomtune-" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratio_table_compares_only_measured_contenders():
    def figures(name: str, speed: float, memory: float) -> dict[str, Any]:
        return {"workload": "short", "name": name, "round": 0, "examples_per_second": speed, "peak_memory_mb": memory,
                "computed_tokens": 9, "loss": 1.0, "share_of_floor": 0.5}  # fmt: skip

    trl, own, padded = figures("trl-packed-fp32", 2, 10), figures("atomtune-fp32", 6, 5), figures("tutorial", 1, 20)
    slower = figures("atomtune-padded-fp32", 3, 30)
    assert "| short | trl-packed-fp32 | atomtune-fp32 | **3.0×** | 0.50 |" in bench.report([trl, own, padded, slower])
    assert "| short | tutorial | atomtune-fp32 | **6.0×** | 0.25 |" in bench.report([padded, own])
    assert "×" not in bench.report([own, slower]), "there is nothing beside it"


@pytest.mark.slow
def test_the_dry_run_for_a_gpu_does_every_job_and_ends_with_a_verdict(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry_run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert list(lines) == [job["name"] for job in gpu.jobs(dry_run=True)]
    assert {name for name, line in lines.items() if "verdict" in line} == {"machine", "attention", "equality"}
    for name, line in lines.items():
        assert "error" not in line, line
        if name.endswith((" atomtune", " plain")):
            assert line["tokens_per_s"] > 0 and line["loss"] > 0, line
    # A tree computes the shared instruction once; the padded contender computes it for each record.
    assert lines["style 16 atomtune"]["tokens_a_step"] < lines["style 16 plain"]["tokens_a_step"] / 2


@pytest.mark.slow
def test_moe_and_linear_attention_models_are_benchmarked_as_trees_too(tmp_path):
    out = tmp_path / "kinds.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry_run", "--kinds", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    for shape in gpu_workloads.KINDS:
        assert lines[f"equality {shape}"]["verdict"] == "PASS", lines[f"equality {shape}"]
        tree, padded = (lines[f"{shape} style 16 {name}"] for name in ("atomtune", "atomtune-padded"))
        assert (tree["note"], padded["note"]) == ("tree", "padded")
        assert tree["loss"] == pytest.approx(padded["loss"], abs=0.01)
        assert tree["tokens_a_step"] < padded["tokens_a_step"] / 2


def test_a_crashed_or_hung_job_is_isolated_and_reported(tmp_path, monkeypatch):
    def crash(*_):
        os.write(2, b"last words")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setitem(gpu.KINDS, "crash", crash)
    monkeypatch.setitem(gpu.KINDS, "hang", lambda *_: time.sleep(60))
    monkeypatch.setitem(gpu.KINDS, "raise", lambda *_: 1 / 0)
    lines = {
        kind: gpu.run_forked({"name": kind, "kind": kind, "dry_run": True}, tmp_path, tmp_path, limit=5)
        for kind in ("crash", "hang", "raise")
    }
    assert "-9" in lines["crash"]["error"] and "last words" in lines["crash"]["stderr"]
    assert lines["hang"]["error"] == "killed after 5 s"
    assert "ZeroDivisionError" in lines["raise"]["error"]


def test_the_profile_of_a_gpu_counts_what_overlaps_once():
    kernel = {"cat": "kernel"}
    events = [
        {**kernel, "name": "sm90_gemm", "ts": 0.0, "dur": 300.0},
        {**kernel, "name": "flash_fwd", "ts": 200.0, "dur": 200.0},  # overlaps with the first for 100
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 700.0, "dur": 50.0},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 0.0, "dur": 900.0},
    ]
    profile = gpu_meter.kernels(events, seconds=900e-6)
    assert profile["idle_share"] == pytest.approx(1 - 450 / 900)
    assert profile["kernels_a_step"] == 1
    assert profile["kinds_ms"] == {"matmul": 0.1, "attention": 0.07, "copies and casts": 0.02}


@pytest.mark.slow
def test_the_profile_of_a_step_adds_up_and_memory_only_grows():
    command = [sys.executable, "-m", "benchmarks.steps", "--source", str(PERSONA), "--shape", "toy"]
    done = subprocess.run(
        [*command, "--records", "96", "--workloads", "short"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines() if "|" in line]
    figures = {name: float(figure.replace(",", "")) for name, figure in rows if figure.replace(",", "").isdigit()}
    parts = [
        figure for name, figure in figures.items() if name.endswith(", ms") and not name.startswith(("a step", "the"))
    ]
    assert sum(parts) == pytest.approx(figures["a step under the profiler, ms"], abs=len(parts))  # each is rounded
    assert figures["frozen matrices, ms"] > 0
    memory = [figure for name, figure in figures.items() if name.endswith(", MB")]
    assert memory == sorted(memory)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_workload_has_as_many_valid_records_as_its_source(name, tmp_path):
    source = workloads.read(PERSONA, 40)
    path = workloads.write(name, source, tmp_path / "made.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(source)
    assert all(record["output"] for record in records)


@pytest.mark.slow
def test_a_defaults_study_resumes_where_it_stopped_and_ends_in_a_table(tmp_path):
    out = tmp_path / "runs.jsonl"
    size = ["--records", "12", "--kinds", "questions", "--seeds", "1", "--held_out", "8"]

    def runs(groups: str) -> list[dict]:
        command = [sys.executable, "-m", "benchmarks.defaults", *size, "--limit", groups, "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    rates = runs("1")
    all_runs = runs("1")
    names = ["rate x 0.5", "the formula's rate", "rate x 1.5", "rate x 2"]
    assert [run["name"] for run in rates] == names
    assert all_runs[:4] == rates, "what the file has is not run again"
    halves = ["half the epochs, rate x 0.5", "half the epochs", "half the epochs, rate x 2"]
    assert [run["name"] for run in all_runs[4:]] == halves
    assert rates[1]["loss"] < rates[0]["loss"] < all_runs[4]["loss"], "few and small steps teach little"
    table = defaults.report(out)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [*names, *halves, "auto above the best of its column"]
    best = min(run["loss"] for run in all_runs)
    assert f"| {rates[2]['loss'] / best - 1:.1%} |" in table.splitlines()[-1], "so short a run takes 1.5 times the rate"


def test_an_adapter_trained_alongside_others_equals_peft_and_adamw_alone():
    base = ROOT / "src" / "atomtune" / "demo" / "base"
    draw = random.Random(0)
    examples = []
    for length in (9, 14, 6, 11, 8, 12):
        ids = [draw.randrange(3, 600) for _ in range(length)]
        examples.append({"input_ids": ids, "completion_mask": [0] * (length - 4) + [1] * 4})
    runs = [
        Run(side_by_side.Settings("wide", 2e-2, 3, 2, warmup=0.5, schedule="cosine", rank=4, alpha=8, dropout=0.0), 5),
        Run(side_by_side.Settings("narrow", 1e-2, 3, 2, rank=2, alpha=16, dropout=0.0), 6),
    ]
    model = plain_model(base, torch.float32).requires_grad_(False)
    adapters, losses = side_by_side.train(model, runs, examples[:5], examples[2:])
    for run, run_losses in zip(runs, losses, strict=True):
        assert run_losses == pytest.approx(peft_losses(base, run, examples[:5], examples[2:]), rel=2e-4)
    best = [min(run_losses) for run_losses in losses]
    assert side_by_side.evaluate(adapters, examples[2:]) == pytest.approx(best), "each as after its best epoch"


def peft_losses(base: Path, run: Run, learned: list[dict], held_out: list[dict]) -> list[float]:
    """Held-out loss after each epoch with PEFT, torch's AdamW and transformers' schedule, one record at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    settings, plain = run.settings, plain_model(base, torch.float32)
    targets = list(all_linear(plain).adapted)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=targets)
    model = get_peft_model(plain, config)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    shapes = [
        shape
        for layer in layers
        for shape in (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape)
    ]
    first = iter(
        side_by_side.first_weights([tuple(shape) for shape in shapes], run).split([math.prod(s) for s in shapes])
    )
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.data = next(first).view(weight.shape).clone()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    steps_an_epoch = math.ceil(len(learned) / settings.batch)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * steps_an_epoch
    schedule = get_scheduler(settings.schedule, optimizer, round(settings.warmup * steps), steps)
    (order,), losses = side_by_side.orders([run], len(learned), settings.epochs), []

    def nats(example: dict) -> torch.Tensor:
        ids = torch.tensor(example["input_ids"])
        scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return -scores.gather(1, ids[1:, None])[:, 0][torch.tensor(example["completion_mask"][1:]).bool()].sum()

    for epoch in range(settings.epochs):
        for number in range(steps_an_epoch):
            start = epoch * len(learned) + number * settings.batch
            batch = [learned[index] for index in order[start : min(start + settings.batch, (epoch + 1) * len(learned))]]
            (sum(map(nats, batch)) / (4 * len(batch))).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(sum(map(nats, held_out)) / (4 * len(held_out))))
    return losses


@pytest.mark.parametrize("kind", ["questions", "style"])
def test_the_records_of_the_study_are_all_different(kind):
    records = list(islice(defaults.records_of(kind, PERSONA), 5_000))
    assert len({record["input"] for record in records}) == 5_000


def test_the_answers_of_the_study_questions_occur_in_their_text():
    for record in islice(defaults.questions(), 500):
        words = record["output"].rstrip(".").replace(",", "").split()
        names = [word for word in words[1:] if word[0].isupper() or word[0].isdigit()]
        assert all(name in record["input"] for name in names)


def test_a_question_is_learned_or_held_out_and_never_both(tmp_path):
    data = tmp_path / "asked-twice.jsonl"
    records = [{"instruction": f"question {i % 200}", "input": "", "output": str(i)} for i in range(400)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    learned, held_out = (
        {json.loads(line)["instruction"] for line in path.read_text().splitlines()}
        for path in quality.split(data, seed=1, records=100, folder=tmp_path)
    )
    assert len(learned) == len(held_out) == 50
    assert not learned & held_out


def test_questions_of_a_wheel_become_unique_records(tmp_path, monkeypatch):
    wheel, out = tmp_path / "corpus.whl", tmp_path / "questions.jsonl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr(
            "corpus/data/english/a.yml", 'conversations:\n- ["Who?", I.]\n- ["Who?", "I. ", So]\n- [alone]\n'
        )
        files.writestr("corpus/data/english/b.yml", 'conversations:\n- ["How many?", 3]\n')
        files.writestr("corpus/data/chinese/a.yml", "conversations:\n- [谁, 我]\n")
    monkeypatch.setattr(sys, "argv", ["questions", str(wheel), str(out)])
    questions.main()
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert records == [
        {"instruction": "Who?", "input": "", "output": "I."},
        {"instruction": "How many?", "input": "", "output": "3"},
    ]


@pytest.mark.slow
def test_a_run_equals_plain_peft_with_the_same_initial_weights_and_order(tmp_path, capsys):
    lines = PERSONA.read_text(encoding="utf-8").splitlines()
    data, held_out = tmp_path / "learned.jsonl", tmp_path / "held-out.jsonl"
    data.write_text("\n".join(lines[:24]) + "\n", encoding="utf-8")
    held_out.write_text("\n".join(lines[-8:]) + "\n", encoding="utf-8")
    flags = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--learning_rate", "2e-3"]
    losses = replay.compare(ROOT / "src" / "atomtune" / "demo" / "base", data, held_out, flags)
    assert len(losses) == 2 and losses[1] < losses[0]
    for ours, plain in losses:
        assert ours == pytest.approx(plain, rel=1e-4)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.skipif(not TRL, reason="trl is not installed")
def test_at_equal_updates_trls_adapter_is_as_good(tmp_path):
    base, out = ROOT / "src" / "atomtune" / "demo" / "base", tmp_path / "quality.jsonl"
    command = [sys.executable, "-m", "benchmarks.quality", "--base", str(base), "--data", str(PERSONA)]
    flags = ["--records", "64", "--epochs", "1", "--seeds", "1", "--out", str(out)]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, text=True)
    ours, theirs = (json.loads(line)["loss"] for line in out.read_text().splitlines())
    assert ours == pytest.approx(theirs, abs=0.01)
    assert "| persona | 1 | 4 |" in quality.table([json.loads(line) for line in out.read_text().splitlines()])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.\nThe answer is: 7", 7),
        ("The answer is: 3. No, the answer is 1,080 apples? The answer is: $1,080.", 1080),
        ("4 * 3 = <<4*3=12>>12\n#### 12", 12),
        ("The answer is: 20/35", Fraction(4, 7)),
        ("The final answer is: 50%\n\nThat was easy.", 50),
        ("The answer is: \\frac{1}{2}", "\\frac{1}{2}"),
        ("The answer is: 3/0", "3/0"),
        ("Let me think step by step", None),
    ],
)
def test_the_number_of_an_answer_is_the_last_one_it_names(text, number):
    assert metamath.number_in(text) == number


def test_the_records_of_the_metamath_comparison_are_short_and_drawn_by_the_seed(tmp_path):
    rows = [{"query": f"{number}?", "response": "x" * (1400 if number % 2 else 9)} for number in range(40)]
    source = tmp_path / "metamath.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = metamath.to_learn(str(source), 20, seed=1)
    assert {record["instruction"] for record in drawn} == {f"{number}?" for number in range(0, 40, 2)}
    assert drawn == metamath.to_learn(str(source), 20, seed=1) != metamath.to_learn(str(source), 20, seed=2)
    with pytest.raises(SystemExit, match="21 needed"):
        metamath.to_learn(str(source), 21, seed=1)


@pytest.mark.slow
def test_the_metamath_comparison_runs_with_both_contenders(tmp_path):
    # The base is too small to answer any of the questions; what is tried is the whole way, from files to a table.
    train, test, out = tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "metamath.jsonl"
    train.write_text(20 * (json.dumps({"query": "1 + 1?", "response": "The answer is: 2"}) + "\n"))
    test.write_text(3 * (json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"))
    command = [sys.executable, "-m", "benchmarks.metamath", "--base", str(ROOT / "src" / "atomtune" / "demo" / "base")]
    flags = ["--train", str(train), "--test", str(test), "--steps", "5", "--dtype", "float32", "--out", str(out)]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == list(metamath.CONTENDERS)
    assert all(line["questions"] == 3 and line["seconds"] > 0 for line in lines)
    assert metamath.table(lines).count("of 3 |") == 2


@pytest.mark.slow
def test_both_contenders_of_the_metamath_comparison_learn_the_same(tmp_path):
    base, template, data = ROOT / "src" / "atomtune" / "demo" / "base", tmp_path / "m.jinja", tmp_path / "data.jsonl"
    template.write_text(metamath.TEMPLATE)
    lines = PERSONA.read_text(encoding="utf-8").splitlines()[:24]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = Namespace(base=str(base), steps=6, seed=0, dtype="float32")
    adapters = []
    for train in (metamath.train_atomtune, metamath.train_peft):
        train(options, data, template, tmp_path / train.__name__)
        adapters.append(load_file(tmp_path / train.__name__ / "adapter_model.safetensors"))
    ours, theirs = adapters
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", workloads.KINDS)
def test_a_model_of_each_kind_is_built_and_adapted_where_atomtune_adapts_it(kind, tmp_path):
    source = [{"instruction": f"question {number}", "input": "", "output": "answer"} for number in range(50)]
    base = plain_model(workloads.build_base(tmp_path, source, kind), torch.float32)
    assert base.config.model_type == kind
    assert set(lora(base).target_modules) == set(all_linear(base).adapted)
    assert not any("experts" in name or name.endswith(".gate") for name in lora(base).target_modules)


def test_every_transformers_family_has_a_table_row_or_an_exclusion_reason():
    reasons = {name for names in tiny_configs.LEFT_OUT.values() for name in names.split()}
    assert not families.without_a_row() - reasons


#: The names in configs for kinds of layers, and for windows.
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size")


def test_a_tiny_model_has_every_layer_kind_of_its_family():
    # In Qwen4, layers with a state allow a tree, but the fourth layer, which selects keys, does not.
    lacking = {}
    for _, family, values in tiny_configs.families():
        if family not in CONFIG_MAPPING:
            continue
        usual, tiny = (
            config.get_text_config().to_dict()
            for config in (CONFIG_MAPPING[family](), AutoConfig.for_model(family, **values))
        )
        kinds = {kind for name in KINDS for kind in set(usual.get(name) or ()) - set(tiny.get(name) or ())}
        windows = {name for name in WINDOWS if (tiny.get(name) or 0) >= families.SHARED_TOKENS}
        if kinds or windows:
            lacking[family] = kinds | windows
    assert not lacking
