"""The benchmarks run, on a toy model: every contender that is installed, one process each."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from atomtune.model.lora_targets import all_linear
from benchmarks import gpu, gpu_meter, gpu_workloads, quality, workloads
from benchmarks.contender import lora, plain_model

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
    # All begin at the same weights and see the same records, so their first losses are near each other.
    assert max(run["loss"] for run in runs) - min(run["loss"] for run in runs) < 0.05
    shared = next(run for run in runs if run["name"] == "atomtune-bf16")
    assert shared["layout"] == "tree"
    assert shared["computed_tokens"] < runs[0]["computed_tokens"] / 2
    assert "atomtune bf16" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


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
def test_experts_and_linear_attention_are_tried_on_a_gpu_as_trees_too(tmp_path):
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


def test_a_job_that_crashes_or_hangs_ends_alone_and_says_so(tmp_path, monkeypatch):
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
        {**kernel, "name": "flash_fwd", "ts": 200.0, "dur": 200.0},  # beside the first for 100
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
def test_a_workload_is_readable_records_as_many_as_the_source_has(name, tmp_path):
    source = workloads.read(PERSONA, 40)
    path = workloads.write(name, source, tmp_path / "made.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(source)
    assert all(record["output"] for record in records)


@pytest.mark.slow
def test_a_study_of_defaults_goes_on_where_it_stopped_and_ends_in_a_table(tmp_path):
    out = tmp_path / "trials.jsonl"
    command = [sys.executable, "-m", "benchmarks.defaults", "--records", "12", "--kinds", "questions", "--seeds", "1"]

    def trials(limit: str) -> list[dict]:
        flags = ["--limit", limit, "--answers", "0", "--out", str(out)]
        done = subprocess.run([*command, *flags], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    first = trials("1")
    both = trials("1")
    assert [trial["name"] for trial in first] == ["atomtune 0.1"]
    assert both[0] == first[0] and len(both) == 2, "what the file has is not run again"
    assert both[1]["learning_rate"] > both[0]["learning_rate"]
    assert both[1]["loss"] < both[0]["loss"], "twelve records in three steps at 1e-4 teach nothing"
    table = subprocess.run(
        [sys.executable, "-m", "benchmarks.defaults", "--table", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = [line for line in table.splitlines() if line.startswith("| ") and "rate" in line]
    assert len(rows) == 2 and "| 0% |" in rows[0] and "batch 4" in rows[0]


def test_the_questions_of_the_study_are_all_different_and_answered_by_their_text():
    from itertools import islice

    from benchmarks.defaults import questions

    records = list(islice(questions(), 500))
    assert len({record["input"] for record in records}) == 500
    for record in records:
        names = [word for word in record["output"].rstrip(".").split() if word[0].isupper() or word[0].isdigit()]
        assert all(word.strip(",") in record["input"] for word in names if word not in ("It",))


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


@pytest.mark.parametrize("kind", workloads.KINDS)
def test_a_model_of_each_kind_is_built_and_adapted_where_atomtune_adapts_it(kind, tmp_path):
    source = [{"instruction": f"question {number}", "input": "", "output": "answer"} for number in range(50)]
    base = plain_model(workloads.build_base(tmp_path, source, kind), torch.float32)
    assert base.config.model_type == kind
    assert set(lora(base).target_modules) == set(all_linear(base).adapted)
    assert not any("experts" in name or name.endswith(".gate") for name in lora(base).target_modules)
