"""How long does encoding a conversation take, compared with tokenizing its text once?

    python -m benchmarks.encoding_time                       Qwen3's tokenizer and template, 1 to 200 exchanges
    python -m benchmarks.encoding_time --tokenizer FOLDER    another tokenizer with its own template
    python -m benchmarks.encoding_time --limits              2,000 records with and without the limits on the template

Measured in processor time on one core. The reference is one tokenizer call on the rendered text of all turns. Encoding
renders the text, finds each answer, and tokenizes prompts and answers separately. A batch has 200 exchanges in total.
The two are measured in turn for several rounds, and the fastest round of each counts.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS = (1, 10, 50, 200)
EXCHANGES_A_BATCH = 200
WORDS = [
    "the",
    "tide",
    "灯塔",
    "comes",
    "in",
    "at",
    "noon,",
    "says",
    "who;",
    "今天有雾",
    "and",
    "3.5",
    "lamps",
    "(oil)",
]
DEFAULT = Path(os.environ.get("ATOMTUNE_REAL", Path.home() / ".cache" / "atomtune-real")) / "tok" / "qwen3"


def conversations(exchanges: int, draw: random.Random) -> list[dict[str, Any]]:
    """A batch of records with this many exchanges each; every text has 8 to 40 words."""

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(8, 40)))

    def record() -> dict[str, Any]:
        roles = ["user", "assistant"] * exchanges
        return {"messages": [{"role": role, "content": text()} for role in roles]}

    return [record() for _ in range(EXCHANGES_A_BATCH // exchanges)]


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of processor time, which other programs on the machine do not change."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(folder: Path, exchanges: int, rounds: int) -> tuple[float, float]:
    """Seconds to tokenize, and to encode, a batch of conversations with this many exchanges."""
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.data.encoding.encode import Encoder
    from atomtune.data.formats.schema import Schema
    from atomtune.data.reading.raw import RawRecord
    from atomtune.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    template = load_template("auto", tokenizer)
    encoder = Encoder(template, Schema("messages"), max_tokens=10**6)
    values = conversations(exchanges, random.Random(exchanges))
    records = [RawRecord(value, f"a:{number}") for number, value in enumerate(values, 1)]
    texts = [str(tokenizer.apply_chat_template(value["messages"], tokenize=False)) for value in values]

    def tokenized() -> None:
        for text in texts:
            tokenizer(text, add_special_tokens=False)

    def encoded() -> None:
        assert len(encoder(records).records) == len(records)

    tokenized()
    encoded()
    pairs = [(seconds(tokenized), seconds(encoded)) for _ in range(rounds)]
    return min(tokenizing for tokenizing, _ in pairs), min(encoding for _, encoding in pairs)


def seconds_of_records(folder: Path, rounds: int, *, limits: bool) -> float:
    """Seconds of processor time, with child processes, to turn a file of 2,000 one-question records into rows.

    limits  apply the limits on the template, and encode in a process that can be killed; if False, the template is
            compiled as in transformers and this process encodes
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from atomtune.data import encoded_source
    from atomtune.data.encoding import jinja_render
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.data.ledger import Ledger
    from atomtune.model.load import load_tokenizer

    def compiled(source: str) -> Any:
        program = _compile_jinja_template(source)
        program.environment.clock = jinja_render.Clock()
        return program

    if not limits:
        jinja_render.compiled = compiled  # type: ignore[assignment]
        encoded_source.workers_here = lambda: 0  # type: ignore[attr-defined]
    template = load_template("auto", load_tokenizer(str(folder)))
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "records.jsonl"
        values = [value for _ in range(10) for value in conversations(1, draw)]
        file.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")

        def encoded() -> float:
            before = sum(os.times()[:4])
            rules = encoded_source.Rules(max_tokens=10**6)
            parts = list(encoded_source.encoded(file, template, rules, Ledger()))
            assert sum(len(part.table) for part in parts) == len(values)
            return sum(os.times()[:4]) - before

        encoded()
        return min(encoded() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT, help="folder of a tokenizer with a chat template")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limits", action="store_true", help="what the limits on templates cost")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.limits:
        limited = seconds_of_records(arguments.tokenizer, arguments.rounds, limits=True)
        unlimited = seconds_of_records(arguments.tokenizer, arguments.rounds, limits=False)
        print(f"2,000 records: {limited:.2f} s with limits, {unlimited:.2f} s without: {limited / unlimited:.2f} times")
        return
    print("| exchanges | tokenizing, ms a record | encoding, ms a record | times |")
    print("|---|---|---|---|")
    for exchanges in TURNS:
        tokenizing, encoding = measure(arguments.tokenizer, exchanges, arguments.rounds)
        records = EXCHANGES_A_BATCH // exchanges
        milliseconds = [1000 * batch / records for batch in (tokenizing, encoding)]
        print(f"| {exchanges} | {milliseconds[0]:.2f} | {milliseconds[1]:.2f} | {encoding / tokenizing:.1f} |")


if __name__ == "__main__":
    main()
