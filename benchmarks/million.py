"""Read and encode a million records: time compared with the tokenizer alone, memory, and the second start.

    python -m benchmarks.million --records 1000000 --source train.jsonl

The reference is the tokenizer's own rate: the same prompts and answers as texts in memory, in batches, with all threads
that it uses. Nothing is trained and no model is created.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.contender import figures_of

#: Texts per call of the tokenizer; larger batches were no faster.
_BATCH = 1000


def write(source: Path, count: int, path: Path) -> Path:
    """Write `count` records like the source's: a random question, made unique by a number, and a random answer."""
    with source.open(encoding="utf-8") as lines:
        known = [json.loads(line) for line in lines if line.strip()]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            question, answer = draw.choice(known), draw.choice(known)
            record = {**question, "instruction": f"{question['instruction']} {number}", "output": answer["output"]}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def bare(base: Path, data: Path, count: int) -> float:
    """Records per second of the tokenizer alone: prompts and answers are tokenized in separate batches."""
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(base))
    template = load_template("atom", tokenizer)
    prompts, answers = [], []
    with data.open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            record = json.loads(line)
            messages = [
                {"role": "system", "content": record["instruction"]},
                {"role": "user", "content": record["input"]},
            ]
            prompts.append(template.render(messages if record["input"] else [{**messages[0], "role": "user"}]))
            answers.append(record["output"])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = tokenizer.backend_tokenizer
    backend.encode_batch_fast(prompts[:_BATCH], add_special_tokens=False)
    began = time.perf_counter()
    for texts in (prompts, answers):
        for start in range(0, len(texts), _BATCH):
            encodings = backend.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False)
            [encoding.ids for encoding in encodings]
    return len(prompts) / (time.perf_counter() - began)


def encode(base: Path, data: Path, cache: Path) -> dict[str, Any]:
    """Start a run, up to the examples: seconds, records per second, and memory of this process and its children."""
    from atomtune.data.cache import examples_of
    from atomtune.data.encoded_source import Rules
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.model.load import load_tokenizer

    template = load_template("atom", load_tokenizer(str(base)))
    before = _memory()
    peak = Peak()
    began = time.perf_counter()
    encoded = examples_of(data, template, Rules(max_tokens=256), cache_dir=cache)
    seconds = time.perf_counter() - began
    return {
        "records": encoded.ledger.records_read,
        "rows": len(encoded.examples),
        "seconds": seconds,
        "records_per_second": encoded.ledger.records_read / seconds,
        "peak_memory_mb": peak.stop() / 1e6,
        "memory_before_mb": before / 1e6,
        "largest_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def _memory() -> int:
    """Memory in bytes of this process and its children; pages that they share count once (PSS)."""
    import psutil

    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


class Peak:
    """The largest memory, sampled five times per second."""

    def __init__(self) -> None:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.most = max(self.most, _memory())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def _apart(*words: str) -> Any:
    """Run a part of this module in its own process and return what it prints."""
    return figures_of("benchmarks.million", words, what=" ".join(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of the tokenizer alone and a whole start")
    parser.add_argument("--source", type=Path, default=workloads.PERSONA, help="dialogues that the records are made of")
    parser.add_argument("--part", choices=("bare", "encode"), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help="a model's folder, for its tokenizer")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "bare":
        print(json.dumps(bare(options.base, options.data, options.records)))
    elif options.part == "encode":
        print(json.dumps(encode(options.base, options.data, options.cache)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Time the tokenizer alone, the encoding and a start from the cache, in turn; print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or workloads.build_base(Path(folder) / "base", workloads.read(options.source, 10**9), "toy")
        data = write(options.source, options.records, Path(folder) / "million.jsonl")
        print(f"{options.records:,} records, {data.stat().st_size / 1e6:.0f} MB", flush=True)
        ratios, starts = [], []
        for turn in range(options.rounds):
            alone = _apart(
                *("--part", "bare", "--base", str(base), "--data", str(data)),
                *("--records", str(min(options.records, 200_000))),
            )
            cache = Path(folder) / f"cache-{turn}"
            whole = ("--part", "encode", "--base", str(base), "--data", str(data), "--cache", str(cache))
            first, second = _apart(*whole), _apart(*whole)
            ratios.append(first["records_per_second"] / alone)
            starts.append((alone, first, second))
            print(
                f"round {turn}: tokenizer alone {alone:,.0f} records/s; read and encoded "
                f"{first['records_per_second']:,.0f} records/s ({ratios[-1]:.2f} of it), {first['seconds']:.1f} s, "
                f"peak {first['peak_memory_mb']:,.0f} MB "
                f"({first['memory_before_mb']:,.0f} before); from the cache {second['seconds']:.2f} s",
                flush=True,
            )
    print(f"median share of the tokenizer's own rate: {statistics.median(ratios):.2f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets", "pyarrow"))
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
