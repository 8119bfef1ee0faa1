"""Does the demo give the same answers on another machine?

The demo is run several times, with noise as small as the rounding of another processor and with other numbers of
threads. The answers to every held-out prompt are listed.

    python tools/steady_demo.py --runs 4 [--prompts CANDIDATES.jsonl] [--seeds]

Exit code 1 if a prompt got more than one answer. The noise: each weight of the base times 1 + 1e-6 * a normal draw.
--seeds also gives each run another seed, which changes far more than a processor does, as a later version might.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from atomtune.settings import read
from atomtune.train import samples

NOISE = 1e-6  # float32 rounds at 6e-8 of a value; a sum over a row of weights is off by about ten times that


def lay_noisy_demo(folder: Path, seed: int, prompts: Path | None) -> None:
    """Copy the demo and add noise to every weight of its base; seed 0 adds none."""
    shutil.copytree(read.DEMO_FOLDER, folder)
    if prompts:
        shutil.copy(prompts, folder / "held_out.jsonl")
    weights = {name: tensor.float() for name, tensor in load_file(folder / "base" / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    if seed:
        weights = {name: w * (1 + NOISE * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})


def answers_of_a_run(seed: int, threads: int, prompts: Path | None, flags: list[str]) -> dict[str, tuple[str, str]]:
    """Prompt → the answers before and after training."""
    from atomtune.cli import main as command

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        folder = Path(temporary, "demo")
        lay_noisy_demo(folder, seed, prompts)
        read.DEMO_FOLDER = samples.DEMO_FOLDER = folder
        with contextlib.redirect_stdout(io.StringIO()):
            code = command(["train", *flags, "--output_dir", "out"])
        if code:
            raise SystemExit(f"the demo ended with {code}")
        record = json.loads(Path("out", "run.json").read_text(encoding="utf-8"))
    return {sample["prompt"]: (sample["before"], sample["after"]) for sample in record["samples"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="the first without noise")
    parser.add_argument("--prompts", type=Path, help="candidates instead of the demo's held_out.jsonl")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="used in turn")
    parser.add_argument("--seeds", action="store_true", help="another seed in each run")
    options, flags = parser.parse_known_args()  # other flags go to `atomtune train`
    original = read.DEMO_FOLDER
    answers: dict[str, list[tuple[str, str]]] = {}
    for seed in range(options.runs):
        read.DEMO_FOLDER = original
        seeded = [*flags, "--seed", str(42 + seed)] if options.seeds else flags
        seen = answers_of_a_run(seed, options.threads[seed % len(options.threads)], options.prompts, seeded)
        for prompt, pair in seen.items():
            answers.setdefault(prompt, []).append(pair)
    unsteady = 0
    for prompt, pairs in answers.items():
        same = len(set(pairs)) == 1
        unsteady += not same
        print(
            json.dumps({"prompt": prompt, "steady": same, "answers": Counter(pairs).most_common()}, ensure_ascii=False)
        )
    print(f"{len(answers) - unsteady} of {len(answers)} prompts: the same answers in all {options.runs} runs")
    return 1 if unsteady else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
