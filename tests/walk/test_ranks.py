"""Two processes train like one: the same global batches, loss, adapter and counts.

32 records make 4 complete steps, so no rank needs filling; otherwise accelerate repeats records at an epoch's end.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from atomtune.cli import main
from tests import tiny
from tests.train.test_trainer import relative_difference


@pytest.mark.slow
def test_two_ranks_give_the_same_run_as_one(models, dialogues, tmp_path):
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    flags = ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "5", "--learning_rate", "1e-2"]
    flags += ["--logging_steps", "1", "--eval_size", "8", "--gradient_accumulation_steps", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, *flags, "--output_dir", str(one), "--per_device_train_batch_size", "4"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "atomtune"]
    more = ["--output_dir", str(two), "--per_device_train_batch_size", "2"]
    done = subprocess.run(
        [*launcher, *command, *flags, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records read") == 1, "one rank speaks"
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (two, one))
    losses = [[entry["loss"] for entry in record["loss_history"]] for record in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the Trainer's running loss is float32
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-9)
    assert ours["records_used"] == theirs["records_used"] == 40
    examples = [record["examples_per_second"] * record["seconds"] for record in (ours, theirs)]
    assert examples[0] == pytest.approx(examples[1])
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (two, one)]
    assert relative_difference(*adapters) < 1e-6  # rows are padded to other widths, and RMSNorm computes in float32


@pytest.mark.slow
def test_two_ranks_train_experts_that_no_token_of_a_step_chose(models, dialogues, tmp_path, monkeypatch):
    # Experts that are layers of their own have no gradient in such a step, and DDP waited for it: "Expected to have
    # finished reduction in the prior iteration".
    code = tiny.REMOTE_MODEL.replace("self.before, self.after", EXPERTS).replace("return x + self.down_proj", ROUTED)
    monkeypatch.setattr(tiny, "REMOTE_MODEL", code)
    base = tmp_path / "base"
    base.mkdir()
    tiny.build("baichuan_like", base)
    command = ["train", "--model_path", str(base), "--dataset_path", str(dialogues), "--trust_remote_code", "--use_cpu"]
    command += ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "3", "--learning_rate", "1e-2"]
    # Padding chooses experts too, with a gradient of zero instead of none, which are the same only without momentum.
    command += ["--lora_experts", "--gradient_accumulation_steps", "2", "--eval_size", "0", "--optim", "sgd"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, "--output_dir", str(one), "--per_device_train_batch_size", "2"]) == 0
    assert "no gradient reaches" in (one / "run.json").read_text()
    ranks = _two_ranks([*command, "--output_dir", str(two), "--per_device_train_batch_size", "1"], tmp_path)
    codes = [process.wait(timeout=600) for process in ranks]
    assert codes == [0, 0], (tmp_path / "rank-0.txt").read_text(encoding="utf-8")
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (two, one)]
    assert any(".experts." in name for name in adapters[0])
    assert relative_difference(*adapters) < 1e-6


#: In place of parts of a tiny model's own code: each token is computed by one of 64 experts as well.
EXPERTS = """self.experts = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(64))
        self.before, self.after"""
ROUTED = """chosen = (1e4 * y[..., 0].detach()).long() % 64
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                x = x + (chosen == number)[..., None] * expert(y)
        return x + self.down_proj"""


@pytest.mark.slow
def test_records_repeated_to_fill_the_last_batch_are_reported(models, dialogues, tmp_path):
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    command += ["--max_steps", "1", "--eval_size", "0", "--per_device_train_batch_size", "3"]
    ranks = _two_ranks([*command, "--output_dir", str(tmp_path / "out")], tmp_path)
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    notices = json.loads((tmp_path / "out" / "run.json").read_text())["notices"]
    assert any("2 of 40 records are repeated at the end of each epoch" in notice for notice in notices)


@pytest.mark.slow
def test_two_ranks_share_a_stream(models, dialogues, tmp_path):
    # Each rank reads the whole stream and takes its part of each batch. Catches ranks that train on the same records.
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    command += ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "7", "--learning_rate", "1e-2"]
    command += ["--logging_steps", "1", "--streaming", "--shuffle_buffer", "6"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, "--output_dir", str(one), "--per_device_train_batch_size", "4"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "atomtune"]
    done = subprocess.run(
        [*launcher, *command, "--output_dir", str(two), "--per_device_train_batch_size", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (two, one))
    losses = [[entry["loss"] for entry in record["loss_history"]] for record in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (two, one)]
    assert relative_difference(*adapters) < 1e-6


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_they_resume_identically(models, dialogues, tmp_path):
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    command += ["--dtype", "float32", "--max_steps", "60", "--save_steps", "5", "--save_total_limit", "2"]
    command += ["--logging_steps", "1", "--per_device_train_batch_size", "2", "--eval_size", "8", "--eval_steps", "7"]
    command += ["--eval_strategy", "steps"]

    def ended(ranks):
        codes = [process.wait(timeout=120) for process in ranks]
        return codes, "".join((tmp_path / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1))

    whole, out = tmp_path / "whole", tmp_path / "out"
    codes, words = ended(_two_ranks([*command, "--output_dir", str(whole)], tmp_path))
    assert codes == [0, 0], words
    ranks = _two_ranks([*command, "--output_dir", str(out)], tmp_path)
    _wait_for_checkpoint(out / "checkpoint-10", ranks)
    os.kill(ranks[1].pid, signal.SIGUSR1)  # only the second rank
    codes, words = ended(ranks)
    assert codes == [75, 75], words
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "preempted", words
    assert record["steps"] < 60
    codes, words = ended(_two_ranks([*command, "--output_dir", str(out), "--resume"], tmp_path))
    assert codes == [0, 0], words
    assert words.count("Resuming from") == 1
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, whole)]
    assert files[0] == files[1]
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    assert ours["loss_history"] == theirs["loss_history"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank_lost", "number", "cause"), [(0, "SIGSTOP", "--ddp_timeout"), (1, "SIGKILL", "lost its connection")]
)
def test_an_unresponsive_rank_ends_the_other_rank_within_ddp_timeout(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, tmp_path, rank_lost, number, cause
):
    # Catches a limit without effect: on CPUs transformers does not pass it on, and the other rank waited half an hour.
    out, seconds = tmp_path / "out", 4
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    command += ["--dtype", "float32", "--max_steps", "5000", "--save_steps", "5", "--save_total_limit", "2"]
    command += ["--eval_size", "0", "--ddp_timeout", str(seconds), "--output_dir", str(out)]
    ranks = _two_ranks(command, tmp_path)
    try:
        _wait_for_checkpoint(out / "checkpoint-10", ranks)
        os.kill(ranks[rank_lost].pid, getattr(signal, number))
        # The time limit, plus the time that Python and torch need to exit on a busy machine.
        assert ranks[1 - rank_lost].wait(timeout=seconds + 10) == 3
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    words = (tmp_path / f"rank-{1 - rank_lost}.txt").read_text(encoding="utf-8")
    assert cause in words
    assert f"Last complete checkpoint: {out / 'checkpoint-'}" in words
    assert "Traceback" not in words


@pytest.mark.slow
def test_a_program_gets_the_finished_run_on_every_rank(models, dialogues, tmp_path):
    # Regression: the second rank read run.json while the first one was still writing it, so its eval_loss was None.
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    words = [str(tmp_path / "program.py"), str(models("llama")), str(dialogues), str(tmp_path / "out")]
    ranks = _two_ranks(words, tmp_path, program=[])
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    said = [(tmp_path / f"rank-{rank}.txt").read_text(encoding="utf-8").splitlines()[-1] for rank in (0, 1)]
    assert said[0] == said[1] and json.loads(said[0])["status"] == "finished"


PROGRAM = """
import json, sys
from atomtune import train
base, data, folder = sys.argv[1:]
run = train(base, data, output_dir=folder, max_steps=2, eval_size=8, dtype="float32", use_cpu=True)
print(json.dumps({**run.figures, "eval_loss": round(run.eval_loss, 9)}))
"""


def _two_ranks(command, folder, program=("-m", "atomtune")):
    """The processes of a launcher without the launcher, which would end all of them as soon as one ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in ("0", "1"):
        with (folder / f"rank-{rank}.txt").open("w", encoding="utf-8") as output:
            environment = {**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            words = [sys.executable, *program, *command]
            ranks.append(subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return ranks


def _wait_for_checkpoint(checkpoint, ranks):
    for _ in range(6000):  # on a busy machine, importing torch and transformers takes a minute
        if (checkpoint / "manifest.json").exists():
            return
        assert all(process.poll() is None for process in ranks), "a rank ended too early"
        time.sleep(0.05)
    raise AssertionError(f"no {checkpoint} within five minutes")
