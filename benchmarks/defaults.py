"""Which defaults are best? Held-out loss and chrF by rate, records and kind of data, with other tools' values.

    python -m benchmarks.defaults --base FOLDER --dialogues FILE.jsonl --seconds 180 --out defaults.jsonl
    python -m benchmarks.defaults --report defaults.jsonl

A group of runs (same base, kind, size, batch, epochs and dropout) is trained side by side (side_by_side.py), and
several processes share the machine. The most informative groups come first. Each run's line is written when its group
ends, and a second call skips the runs that the file already has, so a study that is stopped early is still useful.

`loss` is the mean nats of a held-out answer token after the best epoch, which is the one that `atomtune train` keeps;
`last` is the same after the last epoch. All runs of a kind use the same held-out records.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import queue
import random
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.contender import encoded
from benchmarks.side_by_side import Run, Settings
from benchmarks.workloads import DEMO, PERSONA

KINDS = ("persona", "style", "questions")
#: Longer records are left out: all other records of a batch would be padded to their length.
LONGEST = 128
#: At most this many records in a step of all runs of a group together; a GPU of 80 GB holds six such groups.
MOST_TOGETHER = 80
#: For runs of these sizes, the first seed writes answers of at most so many tokens to so many held-out prompts (chrF).
ANSWERED_SIZES, ANSWERED_PROMPTS, ANSWER_TOKENS = (200,), 40, 56
#: From this many records on, a run takes long and gets one seed and fewer settings.
LARGE = 2000

#: The name of the settings whose rate depends only on the base's width.
FORMULA = "the formula's rate"

#: LoRA examples of other tools: rate, records per step, epochs, warm-up, schedule, rank, alpha, dropout. LLaMA-Factory:
#: examples/train_lora/qwen3_lora_sft.yaml. Unsloth: its notebooks (2 x 4 records, 5 warm-up steps; here one epoch in
#: place of 60 steps). Axolotl: examples/llama-3/lora-1b.yml. TRL: the LoRA line of its sft script.
OTHERS = (
    Settings("LLaMA-Factory", 1e-4, 8, 3, 0.1, "cosine", rank=8, alpha=16, dropout=0.0),
    Settings("Unsloth", 2e-4, 8, 1, 0.08, "linear", rank=16, alpha=16, dropout=0.0),
    Settings("Axolotl", 2e-4, 4, 1, 0.1, "cosine", rank=16, alpha=32, dropout=0.05),
    Settings("TRL", 2e-4, 16, 1, 0.0, "linear", rank=32, alpha=16, dropout=0.05),
)


@dataclass(frozen=True)
class Group:
    """Runs that are trained side by side."""

    base: str
    kind: str
    records: int
    runs: tuple[Run, ...]


def formula_settings(base: str, records: int) -> Settings:
    """atomtune's own defaults for this number of training records, with the rate that the width formula gives.

    In a short run, `atomtune train` multiplies that rate by SHORT_RUN_TIMES (see name_of_auto).
    """
    from transformers import TrainingArguments

    from atomtune.model.base_shape import base_shape
    from atomtune.settings.run_settings import LoraSettings
    from atomtune.train.defaults import (
        MOST_EPOCHS,
        SHORT_RUN_STEPS,
        USUAL_EPOCHS,
        WANTED_STEPS,
        largest_batch,
        learning_rate,
    )
    from atomtune.train.run_length import run_length

    args = TrainingArguments(use_cpu=True)
    batch = largest_batch(records, args, epochs=USUAL_EPOCHS)
    steps_an_epoch = run_length(records, args, batch=batch).steps_an_epoch
    epochs = min(max(USUAL_EPOCHS, math.ceil(WANTED_STEPS / steps_an_epoch)), MOST_EPOCHS)
    lora = LoraSettings(lora_alpha=Settings.alpha)
    rate, _ = learning_rate(base_shape(base).width, lora, steps=SHORT_RUN_STEPS)
    return Settings(FORMULA, rate, batch, epochs)


def groups(bases: Sequence[str], kinds: Sequence[str], sizes: Sequence[int], seeds: int) -> Iterator[Group]:
    """All groups of the study: bases and sizes in the given order, and the most informative settings first for each."""
    for base in bases:
        for records in sizes:
            is_large = records >= LARGE
            for settings in setting_groups(formula_settings(base, records), is_large=is_large):
                at_once = max(MOST_TOGETHER // settings[0].batch, 1)
                for kind in kinds:
                    seed_range = range(1, 2 if is_large else seeds + 1)
                    runs = [Run(setting, seed) for seed in seed_range for setting in settings]
                    for first in range(0, len(runs), at_once):
                        yield Group(base, kind, records, tuple(runs[first : first + at_once]))


def setting_groups(formula: Settings, *, is_large: bool) -> list[list[Settings]]:
    """The grid and the other tools' settings. Settings in one group share batch, number of epochs and dropout."""
    half = replace(formula, name="half the epochs", epochs=formula.epochs // 2)
    grid = [
        [at_rate(formula, multiple) for multiple in (0.5, 1, 1.5, 2)],
        [at_rate(half, multiple) for multiple in (0.5, 1, 2)],
    ]
    if is_large:
        return [*grid, *([settings] for settings in OTHERS)]
    batch_16 = replace(formula, name="batch 16", batch=16)
    grid += [
        [at_rate(batch_16, multiple) for multiple in (1, 2)],
        [at_rate(formula, multiple) for multiple in (0.25, 4)],
    ]
    return [*grid[:2], *([settings] for settings in OTHERS), *grid[2:]]


def at_rate(settings: Settings, multiple: float) -> Settings:
    """The settings with their rate multiplied; the new name says so."""
    if multiple == 1:
        return settings
    name = f"rate x {multiple:g}" if settings.name == FORMULA else f"{settings.name}, rate x {multiple:g}"
    return replace(settings, name=name, learning_rate=float(f"{settings.learning_rate * multiple:.1e}"))


def records_of(kind: str, dialogues: Path) -> Iterator[dict[str, Any]]:
    """All records of a kind, always in the same order, without repeated questions."""
    if kind == "persona":
        source = workloads.read(dialogues, 1_000_000)
        random.Random(0).shuffle(source)
        yield from {(record["instruction"], record["input"]): record for record in source}.values()
    else:
        yield from {"questions": questions, "style": sailors}[kind]()


SHIPS = ("Heron", "Marlin", "Petrel", "Sea Pink", "Old Tom", "Juniper", "Lantern", "Grey Seal")
TOWNS = ("Tarn", "Osk", "Little Bay", "Fennick", "Saltholm", "Rudd", "Merrow", "Kittiwake")
GOODS = ("salt", "barley", "lamp oil", "rope", "apples", "glass", "tea", "wool")


def questions() -> Iterator[dict[str, str]]:
    """Short questions about a sentence that contains the answer; all sentences differ."""
    draw = random.Random(0)
    seen = set()
    while True:
        ship, town, other, cargo = draw.choice(SHIPS), *draw.sample(TOWNS, 2), draw.choice(GOODS)
        hour, minute, count = draw.randint(5, 21), draw.randrange(0, 60, 5), draw.randint(2, 90)
        text = f"The {ship} left {town} at {hour}:{minute:02} with {count} crates of {cargo} for {other}."
        if text in seen:
            continue
        seen.add(text)
        question, *wordings = draw.choice(
            [
                ("When did the ship leave?", f"It left at {hour}:{minute:02}.", f"At {hour}:{minute:02}."),
                ("Where is the ship bound?", f"It is bound for {other}.", f"For {other}."),
                ("What does the ship carry?", f"It carries {count} crates of {cargo}.", f"Crates of {cargo}, {count}."),
                ("Which ship is it, and from where?", f"It is the {ship}, out of {town}.", f"The {ship} of {town}."),
            ]
        )
        yield {"instruction": question, "input": text, "output": draw.choice(wordings)}


# fmt: off
_PLAIN_AND_SAILOR = {
    "who": (("My neighbour", "me old shipmate"), ("The teacher", "the schoolin' master"), ("My sister", "me own lass"),
            ("The doctor", "the sawbones"), ("Our boss", "the cap'n"), ("A friend", "a messmate o' mine"),
            ("The cook", "the galley hand"), ("The girl next door", "the lass from the next berth")),
    "did": (("bought", "traded good coin for"), ("lost", "let slip"), ("found", "hauled up"), ("sold", "bartered off"),
            ("broke", "stove in"), ("cleaned", "swabbed"), ("painted", "tarred"), ("borrowed", "made off with")),
    "what": (("a small boat", "a wee skiff"), ("some bread", "a heap o' hardtack"), ("an old map", "a weathered chart"),
             ("a new coat", "a fresh oilskin"), ("the kitchen floor", "the galley deck"), ("two chairs", "two stools"),
             ("a bottle of water", "a flask o' sweet water"), ("the garden fence", "the shore rail")),
    "where": (("in town", "ashore"), ("at home", "at the home mooring"), ("by the river", "up the creek"),
              ("near the station", "hard by the landing"), ("at the market", "down the quay")),
    "when": (("yesterday", "last watch"), ("this morning", "at first bell"), ("last week", "a week astern"),
             ("on Sunday", "come the Sabbath"), ("in spring", "when the thaw ran"), ("today", "this very tide")),
}
# fmt: on
_TAILS = ("", "", " Mark me words!", " By the deep!", " So says the log.")


def sailors() -> Iterator[dict[str, str]]:
    """Plain sentences and what an old sailor would say instead; all sentences differ."""
    draw = random.Random(0)
    seen = set()
    while True:
        pairs = [draw.choice(choices) for choices in _PLAIN_AND_SAILOR.values()]
        (who, did, what, where, when), in_sailors_words = zip(*pairs, strict=True)
        price = draw.randint(2, 60)
        text = f"{who} {did} {what} {where} {when}, for {price} dollars."
        if text in seen:
            continue
        seen.add(text)
        who, did, what, where, when = in_sailors_words
        answer = f"Aye, {when} {who} {did} {what} {where}, {price} pieces o' silver it was.{draw.choice(_TAILS)}"
        yield {"instruction": "Say it as an old sailor would.", "input": text, "output": answer}


def prepare(group: Group, dialogues: Path, folder: Path, held_out_records: int) -> tuple[Any, ...] | None:
    """(training examples, held-out examples, held-out records); None if too few training records are left.

    A third of the wanted number is enough.
    """
    wanted = (group.records + held_out_records) * (3 if group.kind == "persona" else 1)
    rows = [row for _, row in zip(range(wanted), records_of(group.kind, dialogues), strict=False)]
    file = folder / f"{group.kind}-{group.records}.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    examples = encoded(Path(group.base), file)
    fitting = [
        (example, row) for example, row in zip(examples, rows, strict=True) if len(example["input_ids"]) <= LONGEST
    ]
    held_out, rest = fitting[:held_out_records], fitting[held_out_records:]
    learned = rest[: group.records]
    if len(learned) < group.records / 3:
        return None
    held_out.sort(key=lambda pair: len(pair[0]["input_ids"]))  # records of similar length are evaluated together
    return [example for example, _ in learned], [example for example, _ in held_out], [row for _, row in held_out]


class Worker:
    """One process of the study. It loads each base once."""

    def __init__(self, dialogues: Path, folder: Path, held_out_records: int) -> None:
        self.dialogues, self.folder, self.held_out_records = dialogues, folder, held_out_records
        self.models: dict[str, Any] = {}

    def model(self, base: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from atomtune.model.load import good_at_bfloat16

        if base not in self.models:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = torch.bfloat16 if good_at_bfloat16(device) else torch.float32  # as `atomtune train` chooses
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
            self.models[base] = model.requires_grad_(False).to(device)
        return self.models[base]

    def lines(self, group: Group) -> list[dict[str, Any]]:
        """Train a group and return one line per run. A group that does not fit into memory is trained in two halves."""
        import torch

        prepared = prepare(group, self.dialogues, self.folder, self.held_out_records)
        if prepared is None:
            return []
        try:
            return self.trained(group, *prepared)
        except torch.OutOfMemoryError:
            if len(group.runs) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(group.runs) // 2
        halves = group.runs[:middle], group.runs[middle:]
        return [line for runs in halves for line in self.trained(replace(group, runs=runs), *prepared)]

    def trained(self, group: Group, learned: Any, held_out: Any, rows: Any) -> list[dict[str, Any]]:
        import torch

        from benchmarks.side_by_side import train

        model, began = self.model(group.base), time.monotonic()
        adapters, losses = train(model, group.runs, learned, held_out)
        seconds = time.monotonic() - began
        first_seed = [number for number, run in enumerate(group.runs) if run.seed == 1]
        step = math.ceil(len(held_out) / ANSWERED_PROMPTS)  # they are sorted by length, so this takes all lengths
        answered = held_out[::step]
        texts: dict[int, list[str]] = {}
        if group.records in ANSWERED_SIZES and first_seed:
            texts = dict(zip(first_seed, self.written(group.base, adapters, first_seed, answered), strict=True))
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
        lines = []
        for number, (run, run_losses) in enumerate(zip(group.runs, losses, strict=True)):
            line = line_key(group, run) | {
                "learned": len(learned),
                "steps": run.settings.epochs * math.ceil(len(learned) / run.settings.batch),
                "losses": [round(loss, 5) for loss in run_losses],
                "loss": min(run_losses),
                "last": run_losses[-1],
                "side_by_side": len(group.runs),
                "group_seconds": round(seconds, 1),
                "machine": machine,
                "versions": {name: version(name) for name in ("torch", "transformers")},
            }
            if number in texts:
                pairs = zip(texts[number], rows[::step], strict=True)
                line["answers"] = [[text, row["output"]] for text, row in pairs]
            lines.append(line)
        return lines

    def written(self, base: str, adapters: Any, chosen: list[int], held_out: Any) -> list[list[str]]:
        """The answers of the chosen adapters to the held-out prompts."""
        from transformers import AutoTokenizer

        from benchmarks.side_by_side import answers

        tokenizer = AutoTokenizer.from_pretrained(base)
        prompts, stops = [], set()
        for example in held_out:
            ids, mask = example["input_ids"], example["completion_mask"]
            prompts.append(ids[: mask.index(1)])
            stops.add(ids[max(place for place, learn in enumerate(mask) if learn)])
        (stop,) = stops
        ids_of = answers(adapters, chosen, prompts, stop=stop, most_tokens=ANSWER_TOKENS)
        return [[text.strip() for text in tokenizer.batch_decode(texts)] for texts in ids_of]


def line_key(group: Group, run: Run) -> dict[str, Any]:
    """The values that identify a run in the file."""
    return {
        "base": "demo" if Path(group.base).resolve() == DEMO / "base" else Path(group.base).name,
        "kind": group.kind,
        "records": group.records,
        "seed": run.seed,
        **asdict(run.settings),
    }


def work(waiting: Any, finished: Any, folder: Path, options: argparse.Namespace) -> None:
    """Main function of a process: train groups until none is left or the parent process is gone, even if killed."""
    import torch
    from transformers.utils import logging

    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    worker = Worker(options.dialogues, folder, options.held_out)
    while True:
        group = waiting.get()
        if group is None:
            return
        try:
            finished.put((group, worker.lines(group), ""))
        except Exception:  # noqa: BLE001 - the other groups go on
            finished.put((group, [], traceback.format_exc()))


def _end_with(study: Any) -> None:
    study.join()
    os._exit(1)  # do not finish the group in training, which may take most of an hour


def study(options: argparse.Namespace) -> None:
    """Train all runs that the file does not have yet, until all are done or the time is up."""
    began = time.monotonic()
    out: Path = options.out
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    known = {key_of(json.loads(line)) for line in lines}
    remaining = []
    for group in groups(options.base, options.kinds, options.records, options.seeds):
        runs = tuple(run for run in group.runs if key_of(line_key(group, run)) not in known)
        if runs:
            remaining.append(replace(group, runs=runs))
    remaining = remaining[: options.limit]
    spawn = multiprocessing.get_context("spawn")
    waiting, finished = spawn.Queue(), spawn.Queue()
    for group in remaining:
        waiting.put(group)
    for _ in range(options.processes):
        waiting.put(None)
    with tempfile.TemporaryDirectory() as temporary:
        processes = []
        for number in range(options.processes):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            processes.append(spawn.Process(target=work, args=(waiting, finished, folder, options)))
        for process in processes:
            process.start()
        for _ in remaining:
            left = options.seconds - (time.monotonic() - began) if options.seconds else None
            try:
                done, done_lines, failure = finished.get(timeout=None if left is None else max(left, 0))
            except queue.Empty:
                print(f"The time is up after {time.monotonic() - began:.0f} s.", flush=True)
                break
            progress = f"{time.monotonic() - began:6.1f} s  {done.kind} {done.records}  {done.runs[0].settings.name}"
            print(f"{progress}  {failure or [round(line['loss'], 3) for line in done_lines]}", flush=True)
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in done_lines)
        for process in processes:
            process.terminate()
            process.join()


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    names = ("base", "kind", "records", "seed", *asdict(OTHERS[0]))
    return tuple(line[name] for name in names)


def report(path: Path) -> str:
    """A Markdown table: one row per setting, one column per base, number of records and kind.

    A cell has the best epoch's loss, mean over the seeds, and chrF after a slash if answers were written.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = {}
    learned: dict[tuple[str, int, str], int] = {}
    steps: dict[tuple[str, int, str], int] = {}  # of the run with the formula's settings
    for line in lines:
        column = line["base"], line["records"], line["kind"]
        cells.setdefault(column, {}).setdefault(line["name"], []).append(line)
        learned[column] = line["learned"]
        if line["name"] == FORMULA:
            steps[column] = line["steps"]
    bases = list(dict.fromkeys(line["base"] for line in lines))
    columns = sorted(cells, key=lambda column: (bases.index(column[0]), column[1], KINDS.index(column[2])))
    heads = [f"{base} {kind} {learned[base, records, kind]:,}" for base, records, kind in columns]
    text = [f"| settings | {' | '.join(heads)} |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(line["name"] for line in lines):
        text.append(f"| {name} | {' | '.join(cell_text(cells[column].get(name, [])) for column in columns)} |")
    behind = []
    for column in columns:
        means = {name: mean_loss(of_name) for name, of_name in cells[column].items()}
        auto = name_of_auto(steps.get(column))
        behind.append(f"{means[auto] / min(means.values()) - 1:.1%}" if auto in means else "")
    text.append(f"| auto above the best of its column | {' | '.join(behind)} |")
    return "\n".join(text)


def name_of_auto(steps: int | None) -> str:
    """The name of the row that atomtune's default gives for this number of steps; "" if the number is not known."""
    from atomtune.train.defaults import SHORT_RUN_STEPS, SHORT_RUN_TIMES

    if steps is None:
        return ""
    return f"rate x {SHORT_RUN_TIMES:g}" if steps < SHORT_RUN_STEPS else FORMULA


def mean_loss(lines: Sequence[dict[str, Any]]) -> float:
    return statistics.mean(line["loss"] for line in lines)


def cell_text(lines: Sequence[dict[str, Any]]) -> str:
    """Mean loss, half the range over the seeds, the last epoch's loss if it is over 2 % worse, and chrF."""
    if not lines:
        return ""
    mean, losses = mean_loss(lines), [line["loss"] for line in lines]
    digits = 3 if mean >= 0.1 else 4
    text = f"{mean:.{digits}f}"
    if len(lines) > 1:
        text += f" ± {(max(losses) - min(losses)) / 2:.{digits}f}"
    last = statistics.mean(line["last"] for line in lines)
    if last > 1.02 * mean:
        text += f" (last {last:.{digits}f})"
    scores = [chrf(line["answers"]) for line in lines if line.get("answers")]
    return text + (f" / {statistics.mean(scores):.0f}" if scores else "")


def chrf(answers: Sequence[Sequence[str]]) -> float:
    from sacrebleu.metrics import CHRF

    texts, references = zip(*answers, strict=True)
    return float(CHRF().corpus_score(list(texts), [list(references)]).score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=[str(DEMO / "base")], help="folders")
    parser.add_argument("--records", nargs="+", type=int, default=[50, 200, 1000, 5000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dialogues", type=Path, default=PERSONA, help="instruction/input/output JSONL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held_out", type=int, default=100, help="records that loss and chrF are of")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: when all is done")
    parser.add_argument("--limit", type=int, help="so many groups at most")
    parser.add_argument("--out", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--report", type=Path, help="print the table of such a file and train nothing")
    options = parser.parse_args()
    if options.report:
        print(report(options.report))
    else:
        study(options)
        if options.out.exists():
            print(report(options.out))


if __name__ == "__main__":
    main()
