"""Which defaults: held-out loss and chrF by rate, batch, epochs, warm-up and rank, on small sets of three kinds.

    python -m benchmarks.defaults --base FOLDER --records 50 200 --seeds 1 --out defaults.jsonl
    python -m benchmarks.defaults --table defaults.jsonl
    python -m benchmarks.defaults --base FOLDER --processes 8 --minutes 3    # small runs leave most of a GPU idle

Every trial is one `atomtune train` in this process; its line goes into the file as soon as it ends, and a second call
leaves out what the file has. Trials come in the order in which they tell most: a study that is stopped early is of use.
`loss` is the mean nats of a held-out answer token at the last step, `best` at the best of the evaluations behind each
epoch, which is what a run keeps; the held-out records of a kind are the same in every trial.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workloads

PERSONA = Path(__file__).parents[1] / "src" / "atomtune" / "demo" / "persona.jsonl"
KINDS = ("persona", "style", "questions")
HELD_OUT = 48


@dataclass(frozen=True)
class Settings:
    """What a trial trains with; the values here are atomtune's first defaults, before this study."""

    name: str = "atomtune 0.1"
    learning_rate: float = 1e-4
    batch: int = 16
    epochs: float = 3
    warmup: float = 0.0  # share of the steps
    schedule: str = "linear"
    rank: int = 8
    alpha: float = 32
    dropout: float = 0.1


FIRST = Settings()
#: What `atomtune train` chooses by itself where nothing is set.
AUTO = Settings("atomtune")
CENTRE = replace(FIRST, name="grid", learning_rate=5e-4, batch=4)
#: What other tools' LoRA examples set, as their repositories had it in 2026.
OTHERS = (
    Settings("LLaMA-Factory", 1e-4, 8, 3, 0.1, "cosine", rank=8, alpha=16, dropout=0.0),
    Settings("Unsloth", 2e-4, 8, 1, 0.08, "linear", rank=16, alpha=16, dropout=0.0),
    Settings("Axolotl", 2e-4, 8, 4, 0.1, "cosine", rank=32, alpha=16, dropout=0.05),
    Settings("TRL", 2e-4, 8, 3, 0.0, "linear", rank=16, alpha=32, dropout=0.05),
)


def grid() -> list[Settings]:
    """The trials of one data set: rates first, at two batch sizes; then one setting at a time around the centre."""
    rates = [
        replace(CENTRE, learning_rate=rate, batch=batch)
        for batch in (16, 4)
        for rate in (5e-4, 1e-3, 2e-3, 2e-4, 4e-3)
    ]  # fmt: skip
    epochs = [replace(CENTRE, epochs=epochs) for epochs in (1, 6)]
    others = [
        replace(CENTRE, warmup=0.1),
        replace(CENTRE, schedule="cosine", warmup=0.05),
        replace(CENTRE, rank=32),
        replace(CENTRE, rank=16, alpha=16),
        replace(CENTRE, dropout=0.0),
        replace(CENTRE, batch=8),
    ]
    return list(dict.fromkeys([AUTO, *rates[:4], *OTHERS, FIRST, *rates[4:], *epochs, *others]))


def records_of(kind: str, dialogues: Path) -> Iterator[dict[str, Any]]:
    """All records of a kind, always in the same order."""
    if kind == "questions":
        yield from questions()
        return
    source = workloads.read(dialogues, 1_000_000)
    random.Random(0).shuffle(source)
    yield from workloads.records("short" if kind == "persona" else "style", source)


def questions() -> Iterator[dict[str, str]]:
    """Short questions about a sentence that holds the answer; no two sentences are alike."""
    draw = random.Random(0)
    ships = ("Heron", "Marlin", "Petrel", "Sea Pink", "Old Tom", "Juniper", "Lantern", "Grey Seal")
    towns = ("Tarn", "Osk", "Little Bay", "Fennick", "Saltholm", "Rudd", "Merrow", "Kittiwake")
    goods = ("salt", "barley", "lamp oil", "rope", "apples", "glass", "tea", "wool")
    seen = set()
    while True:
        ship, town, other, cargo = draw.choice(ships), *draw.sample(towns, 2), draw.choice(goods)
        hour, minute, count = draw.randint(5, 21), draw.randrange(0, 60, 5), draw.randint(2, 90)
        text = f"The {ship} left {town} at {hour}:{minute:02} with {count} crates of {cargo} for {other}."
        if text in seen:
            continue
        seen.add(text)
        asked, answer = draw.choice(
            [
                ("When did the ship leave?", f"It left at {hour}:{minute:02}."),
                ("Where is the ship bound?", f"It is bound for {other}."),
                ("What does the ship carry?", f"It carries {count} crates of {cargo}."),
                ("Which ship is it, and where does it come from?", f"It is the {ship}, out of {town}."),
            ]
        )
        yield {"instruction": asked, "input": text, "output": answer}


def lay_data(kind: str, count: int, dialogues: Path, folder: Path) -> tuple[Path, Path] | None:
    """Training and held-out files; None where there are not so many records."""
    source = records_of(kind, dialogues)
    rows = [row for _, row in zip(range(HELD_OUT + count), source, strict=False)]
    if len(rows) < HELD_OUT + count:
        return None
    files = folder / f"{kind}-{count}.jsonl", folder / f"{kind}-held-out.jsonl"
    for path, part in zip(files, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    return files


def run_trial(
    base: str, files: tuple[Path, Path], settings: Settings, *, seed: int, answers: int, folder: Path
) -> dict[str, Any]:
    """Train once; the held-out loss at the end, chrF of some answers, and what it took."""
    from atomtune.cli import main

    train, held_out = files
    flags: dict[str, Any] = {
        "model_path": base, "dataset_path": train, "eval_path": held_out, "output_dir": folder, "seed": seed,
    }  # fmt: skip
    if settings != AUTO:
        count = sum(1 for _ in train.open(encoding="utf-8"))
        steps = round(settings.epochs * math.ceil(count / settings.batch))
        flags |= {
            "learning_rate": settings.learning_rate, "per_device_train_batch_size": settings.batch,
            "num_train_epochs": settings.epochs, "warmup_steps": round(settings.warmup * steps),
            "lr_scheduler_type": settings.schedule, "lora_rank": settings.rank, "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout, "eval_strategy": "epoch", "logging_steps": 1,
            "save_strategy": "no", "max_seq_length": 1024,
        }  # fmt: skip
    command = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(command)
    if code:
        raise SystemExit(f"a trial failed ({code}): {' '.join(command)}\n{printed.getvalue()}")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    losses = [evaluation["loss"] for evaluation in run["eval_history"] if evaluation["step"] > 0]
    return {
        "loss": losses[-1],
        "best": min(losses),
        "chrf": score_answers(folder, held_out, answers) if answers else None,
        "steps": run["steps"],
        "train_seconds": run["seconds"],
    }


def score_answers(adapter: Path, held_out: Path, count: int) -> float | None:
    """chrF of greedy answers to some held-out prompts; None where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from atomtune.data.encoding.choose_template import load_template
    from atomtune.data.records import Turn
    from atomtune.model.generate import prompt_ids

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    template = load_template("auto", tokenizer)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval().to(device)
    stop = tokenizer.convert_tokens_to_ids(template.stop)
    rows = list(workloads.read(held_out, count))
    prompts = [
        prompt_ids(template, template.messages([Turn("user", row["instruction"], row["input"])])) for row in rows
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[stop] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)  # [N, T]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.inference_mode():
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
    answers = [text.strip() for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]
    references = [row["output"] for row in rows]
    return float(CHRF().corpus_score(answers, [references]).score)


def trials_of(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Settings]]:
    """(base, trial, settings) of the whole study; the settings that tell most come first."""
    settings = grid()
    for seed, settings_of_step in ((seed, part) for seed in range(1, options.seeds + 1) for part in settings):
        for base, count, kind in ((b, c, k) for b in options.base for c in options.records for k in options.kinds):
            trial = {"base": Path(base).name, "kind": kind, "records": count, "seed": seed, **asdict(settings_of_step)}
            yield base, trial, settings_of_step


def study(options: argparse.Namespace, *, share: int = 0) -> None:
    """Run what the file does not have yet; of several processes, each its share."""
    out: Path = options.out
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    finished = {key_of(json.loads(line)) for line in lines}
    began, made = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, (base, trial, settings) in enumerate(trials_of(options)):
            if number % options.processes != share or key_of(trial) in finished:
                continue
            files = lay_data(trial["kind"], trial["records"], options.dialogues, Path(temporary))
            if files is None:
                continue
            late = options.minutes and time.monotonic() - began > 60 * options.minutes
            if late or made == options.limit:
                return
            made += 1
            with tempfile.TemporaryDirectory() as folder:
                figures = run_trial(
                    base, files, settings, seed=trial["seed"], answers=options.answers, folder=Path(folder) / "out"
                )
            versions = {name: version(name) for name in ("torch", "transformers", "peft")}
            line = json.dumps({**trial, **figures, "versions": versions, "machine": machine()}, ensure_ascii=False)
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, flush=True)


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"


def study_in_processes(options: argparse.Namespace) -> None:
    """Several shares at once; each line of the file is one short write, which the system keeps whole."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=study, args=(options,), kwargs={"share": share}) for share in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(workers)} processes failed; what the others measured is in {options.out}"
        )


def key_of(trial: dict[str, Any]) -> tuple[Any, ...]:
    measured = ("loss", "best", "chrf", "steps", "train_seconds", "versions", "machine")
    return tuple(sorted((name, str(value)) for name, value in trial.items() if name not in measured))


def table(path: Path) -> str:
    """Held-out loss of every setting over all data sets it was tried on, as Markdown, best first."""
    trials = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parts = []
    for base in dict.fromkeys(trial["base"] for trial in trials):
        of_base = [trial for trial in trials if trial["base"] == base]
        cells = list(dict.fromkeys((trial["kind"], trial["records"]) for trial in of_base))
        rows: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {}
        for trial in of_base:
            by_cell = rows.setdefault(words_of(trial), {})
            by_cell.setdefault((trial["kind"], trial["records"]), []).append(trial)
        best = {cell: min(mean_loss(row[cell]) for row in rows.values() if cell in row) for cell in cells}

        def behind(
            row: dict[tuple[str, int], list[dict[str, Any]]], best: dict[tuple[str, int], float] = best
        ) -> float:
            """How far above the best of each data set, on average; what was not tried everywhere comes last."""
            if len(row) < len(best):
                return float("inf")
            return statistics.mean(mean_loss(row[cell]) / best[cell] - 1 for cell in best)

        head = ["settings", "above the best", *(f"{kind} {count}" for kind, count in cells)]
        lines = [f"**{base}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, row in sorted(rows.items(), key=lambda item: behind(item[1])):
            share = "" if behind(row) == float("inf") else f"{behind(row):.0%}"
            lines.append(f"| {name} | {share} | {' | '.join(cell_text(row.get(cell)) for cell in cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def mean_loss(trials: Sequence[dict[str, Any]]) -> float:
    """Of the checkpoint that a run keeps; of older lines, of the last step."""
    return statistics.mean(trial.get("best", trial["loss"]) for trial in trials)


def cell_text(trials: Sequence[dict[str, Any]] | None) -> str:
    if not trials:
        return ""
    scores = [trial["chrf"] for trial in trials if trial["chrf"] is not None]
    chrf = f" / {statistics.mean(scores):.0f}" if scores else ""
    return f"{mean_loss(trials):.3f}{chrf}"


def words_of(trial: dict[str, Any]) -> str:
    """The settings as one phrase."""
    if trial["name"] == AUTO.name:
        return "atomtune, nothing set"
    named = "" if trial["name"] == "grid" else f"{trial['name']}: "
    warmup = f", warm-up {trial['warmup']:.0%}" if trial["warmup"] else ""
    schedule = "" if trial["schedule"] == "linear" else f", {trial['schedule']}"
    return (
        f"{named}rate {trial['learning_rate']:g}, batch {trial['batch']}, {trial['epochs']:g} epochs"
        f"{warmup}{schedule}, rank {trial['rank']}, alpha {trial['alpha']:g}, dropout {trial['dropout']:g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=[str(PERSONA.parent / "base")], help="folders or hub names")
    parser.add_argument("--records", nargs="+", type=int, default=[50, 200, 1000, 5000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dialogues", type=Path, default=PERSONA, help="instruction/input/output JSONL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=16, help="held-out prompts that are answered, for chrF; 0: none")
    parser.add_argument("--minutes", type=float, default=0, help="begin no trial after so long")
    parser.add_argument("--processes", type=int, default=1, help="trials at a time")
    parser.add_argument("--limit", type=int, help="so many trials at most")
    parser.add_argument("--out", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of a file of trials and end")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
    elif options.processes > 1:
        study_in_processes(options)
    else:
        study(options)


if __name__ == "__main__":
    main()
