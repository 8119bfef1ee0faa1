"""Which defaults: held-out loss and chrF by rate, batch, epochs, warm-up and rank, on small sets of three kinds.

    python -m benchmarks.defaults --base FOLDER --records 50 200 --seeds 1 --out defaults.jsonl
    python -m benchmarks.defaults --table defaults.jsonl

Every trial is one `atomtune train` in this process; its line goes into the file as soon as it ends, and a second call
leaves out what the file has. Trials come in the order in which they tell most: a study that is stopped early is of use.
`loss` is the mean nats of a held-out answer token; the held-out records of a kind are the same in every trial.
"""

import argparse
import contextlib
import io
import json
import math
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
    """What a trial trains with; the values here are atomtune's defaults when the study was written."""

    name: str = "atomtune 0.1"
    learning_rate: float = 1e-4
    batch: int = 16
    epochs: float = 3
    warmup: float = 0.0  # share of the steps
    schedule: str = "linear"
    rank: int = 8
    alpha: float = 32
    dropout: float = 0.1


TODAY = Settings()
CENTRE = replace(TODAY, name="grid", learning_rate=5e-4, batch=4)
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
        for batch in (4, 16)
        for rate in (2e-4, 5e-4, 1e-3, 2e-3)
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
    return list(dict.fromkeys([TODAY, *rates, *epochs, *OTHERS, *others]))


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
    count = sum(1 for _ in train.open(encoding="utf-8"))
    steps = round(settings.epochs * math.ceil(count / settings.batch))
    flags: dict[str, Any] = {
        "model_path": base, "dataset_path": train, "eval_path": held_out, "output_dir": folder, "seed": seed,
        "learning_rate": settings.learning_rate, "per_device_train_batch_size": settings.batch,
        "num_train_epochs": settings.epochs, "warmup_steps": round(settings.warmup * steps),
        "lr_scheduler_type": settings.schedule, "lora_rank": settings.rank, "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout, "eval_strategy": "steps", "eval_steps": steps, "logging_steps": 1,
        "save_strategy": "no", "max_seq_length": 1024,
    }  # fmt: skip
    command = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(command)
    if code:
        raise SystemExit(f"a trial failed ({code}): {' '.join(command)}\n{printed.getvalue()}")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    chrf = score_answers(folder, held_out, answers) if answers else None
    return {"loss": run["eval_loss"], "chrf": chrf, "steps": run["steps"], "train_seconds": run["seconds"]}


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

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    template = load_template("auto", tokenizer)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    stop = tokenizer.convert_tokens_to_ids(template.stop)
    answers, references = [], []
    for row in workloads.read(held_out, count):
        messages = template.messages([Turn("user", row["instruction"], row["input"])])
        ids = torch.tensor([prompt_ids(template, messages)])
        with torch.inference_mode():
            written = model.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=stop)
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
        references.append(row["output"])
    return float(CHRF().corpus_score(answers, [references]).score)


def study(options: argparse.Namespace) -> None:
    """Run what the file does not have yet."""
    out: Path = options.out
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    finished = {key_of(json.loads(line)) for line in lines}
    began, trials = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        for seed, number in ((seed, number) for seed in range(1, options.seeds + 1) for number in range(len(grid()))):
            for base, count, kind in ((b, c, k) for b in options.base for c in options.records for k in options.kinds):
                settings = grid()[number]
                trial = {"base": Path(base).name, "kind": kind, "records": count, "seed": seed, **asdict(settings)}
                files = lay_data(kind, count, options.dialogues, Path(temporary))
                if key_of(trial) in finished or files is None:
                    continue
                late = options.minutes and time.monotonic() - began > 60 * options.minutes
                if late or trials == options.limit:
                    return
                trials += 1
                with tempfile.TemporaryDirectory() as folder:
                    trial |= run_trial(
                        base, files, settings, seed=seed, answers=options.answers, folder=Path(folder) / "out"
                    )
                trial["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
                trial["machine"] = f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(trial, ensure_ascii=False) + "\n")
                print(json.dumps(trial, ensure_ascii=False), flush=True)


def key_of(trial: dict[str, Any]) -> tuple[Any, ...]:
    measured = ("loss", "chrf", "steps", "train_seconds", "versions", "machine")
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
    return statistics.mean(trial["loss"] for trial in trials)


def cell_text(trials: Sequence[dict[str, Any]] | None) -> str:
    if not trials:
        return ""
    scores = [trial["chrf"] for trial in trials if trial["chrf"] is not None]
    chrf = f" / {statistics.mean(scores):.0f}" if scores else ""
    return f"{mean_loss(trials):.3f}{chrf}"


def words_of(trial: dict[str, Any]) -> str:
    """The settings as one phrase."""
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
    parser.add_argument("--limit", type=int, help="so many trials at most")
    parser.add_argument("--out", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of a file of trials and end")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
    else:
        study(options)


if __name__ == "__main__":
    main()
