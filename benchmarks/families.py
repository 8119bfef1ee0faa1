"""Which families of models can be trained, and how? A table of tiny models of the installed transformers.

    python -m benchmarks.families                  prints the table
    python -m benchmarks.families --write          and writes it to docs/models.md
    python -m benchmarks.families qwen3_moe lfm2   some families
    python -m benchmarks.families --json old.json  with another transformers, to be given to --beside here

Each model gets random weights, an adapter with the default settings, and the layout that `train` chooses. Its loss,
log-probabilities and adapter gradients are compared with plain transformers + PEFT on one record at a time. For a tree
layout, one step on records with a shared prefix is also timed against the same step on padded rows, in turn.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from atomtune.batch.collate import Collator
from atomtune.batch.row import padded_tokens
from atomtune.batch.tree import graft
from atomtune.choices import Layout
from atomtune.data.records import Example
from atomtune.errors import AtomtuneError
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.agreement import another_plain_way
from atomtune.model.attention_in_use import AttentionInUse
from atomtune.model.auto_class import auto_class
from atomtune.model.fused_layers import fuse_layers
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import keep_soft_caps, quiet_libraries
from atomtune.model.lora_targets import match_targets
from atomtune.model.loss import innermost, target_nats
from atomtune.settings.run_settings import LoraSettings
from atomtune.verify import Result, in_batches, one_at_a_time
from benchmarks.tiny_configs import LEFT_OUT, SIZE, WORDS, Values, families

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
#: A layout counts as equal within these, or within so many times the difference of two plain runs (float32).
_EQUAL_LOSS, _EQUAL_GRADIENT, _TIMES_NOISE = 1e-5, 1e-4, 20.0
#: A limit whatever the noise is: if two plain runs have different gradients, a comparison shows nothing.
_MOST_GRADIENT = 0.3

#: Length of a prefix that records share: longer than a chunk of linear attention and than every window used here.
SHARED_TOKENS = 70
#: The timed step: records, tokens of the shared prefix, tokens of their own; and the number of timed pairs.
_TIMED_RECORDS, _TIMED_TRUNK, _TIMED_OWN, _PAIRS = 16, 200, range(24, 57), 3


@dataclass(frozen=True)
class Finding:
    """The result of one family's trial."""

    family: str
    class_name: str = ""
    layout: str = ""
    reason: str = ""  # why the layout is padded, or what failed
    apart: tuple[float, float, float] | None = None  # loss (relative), log-probability (largest), gradient (relative)
    noise: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the same, between two plain runs
    adapted: str = ""
    faster: float | None = None  # time of a step with padded rows / time with the tree
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        if self.apart is None:
            return False
        loss, _, gradient = self.apart
        loss_allowed = max(_EQUAL_LOSS, _TIMES_NOISE * self.noise[0])
        gradient_allowed = min(_MOST_GRADIENT, max(_EQUAL_GRADIENT, _TIMES_NOISE * self.noise[2]))
        return loss <= loss_allowed and gradient <= gradient_allowed

    @property
    def verdict(self) -> str:
        if self.apart is None:
            return "not here" if self.reason.startswith("not in") else "fails"
        return "equal" if self.is_equal else "DIFFERS"


def build(family: str, values: Values) -> Any:
    """A tiny model in float32. Raises ValueError if transformers does not know the family."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **values)
    config.use_cache = False
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    keep_soft_caps(model)
    return model


def some_examples() -> list[Example]:
    """Records with a prefix longer than a chunk of linear attention, forks at two levels, a repetition, a lone one."""
    draw = Random(3)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, WORDS) for _ in range(tokens))

    long, short = text(SHARED_TOKENS), text(18)
    fork = (*short, *text(17))
    ids = [(*long, *text(n)) for n in (4, 9, 21)] + [(*fork, *text(n)) for n in (3, 12)] + [(*short, *text(6))]
    ids += [text(11), ids[1], (*long, ids[0][70], *text(3))]
    return [
        Example(record, (*9 * [0], *[draw.randint(0, 1) for _ in record[10:]], 1), f"record {number}")
        for number, record in enumerate(ids, 1)
    ]


def examine(family: str, values: Values) -> Finding:
    """Adapt, lay out and compare one family like `train` and `verify` do."""
    base = build(family, values)
    base.requires_grad_(False)
    class_name = type(base).__name__
    lora = LoraSettings()
    counts = match_targets(base, lora.lora_targets)
    model = new_adapter(base, LoraSpec(**{**lora.lora(), "rank": 4})).eval()
    adapted = ", ".join(sorted(counts))
    _as_after_training(model)
    examples = some_examples()
    plain = one_at_a_time(model, examples)
    noise = _noise(model, examples, plain)
    fuse_layers(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    own_attention = AttentionInUse.of(innermost(model))
    reason = why_padded(model)
    layout: Layout = "tree" if reason is None else "padded"
    collator = collator_for(model, layout, pad_id=0, as_examples=lambda stored: (Example(**stored),))
    ours, _ = in_batches(model, examples, collator, per_batch=len(examples))
    faster = None if reason else _times_faster(model, collator, own_attention)
    return Finding(family, class_name, collator.layout, reason or "", _apart(ours, plain), noise, adapted, faster)


def _times_faster(model: Any, collator: Collator, own_attention: AttentionInUse) -> float:
    """Time of a step with padded rows / time of the same step with a tree: the median of the pairs."""
    inner = innermost(model)
    padded = dataclasses.replace(collator, layout="padded", mixers=None)
    batch, padded_batch = collator.lay(timed_examples()), padded.lay(timed_examples())
    of_rows = AttentionInUse.of(inner)
    ratios = []
    for _ in range(1 + _PAIRS):
        own_attention.give_back()
        padded_seconds = _step_seconds(model, padded_batch)
        of_rows.give_back()
        ratios.append(padded_seconds / _step_seconds(model, batch))
    return statistics.median(ratios[1:])  # the first pair warms up


def timed_examples() -> list[Example]:
    """Records with a shared prefix; the second half of each record's own tokens are targets."""
    draw = Random(5)
    trunk = tuple(draw.randrange(3, WORDS) for _ in range(_TIMED_TRUNK))
    examples = []
    for number in range(_TIMED_RECORDS):
        own = tuple(draw.randrange(3, WORDS) for _ in range(draw.choice(_TIMED_OWN)))
        learn = [0] * (len(trunk) + len(own) // 2) + [1] * (len(own) - len(own) // 2)
        examples.append(Example((*trunk, *own), tuple(learn), f"timed {number}"))
    return examples


def _step_seconds(model: Any, batch: Any) -> float:
    """Seconds of forward and backward for one batch."""
    start = time.perf_counter()
    nats, _ = target_nats(model, batch)
    nats.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def _as_after_training(model: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            size = weight.shape[-1] ** -0.5 * (1.0 if "lora_A" in name else 0.2)
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * size)


def _noise(model: Any, examples: Sequence[Example], plain: Result) -> tuple[float, float, float]:
    """Difference of two plain runs. The delta rule amplifies rounding; in float64 Qwen3.5 agrees to 1e-12."""
    with another_plain_way(model):
        return _apart(one_at_a_time(model, examples), plain)


def _apart(ours: Result, plain: Result) -> tuple[float, float, float]:
    worst = 0.0
    for name, gradient in plain.gradients.items():
        difference = (ours.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        worst = max(worst, difference.nan_to_num(nan=float("inf")).item())
    score = (ours.log_probabilities - plain.log_probabilities).abs().max().item()
    return abs(ours.loss - plain.loss) / plain.loss, score, worst


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block if it takes longer."""

    def stop(*_signal: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(family: str, values: Values, *, limit: int, trace: bool = False) -> Finding:
    """The finding for one family; a failure becomes a finding too."""
    if family not in transformers.CONFIG_MAPPING:
        return Finding(family, reason=f"not in transformers {transformers.__version__}")
    start = time.perf_counter()
    try:
        with _at_most(limit):
            finding = examine(family, values)
    except AtomtuneError as error:
        finding = Finding(family, reason=f"refused: {str(error).splitlines()[0]}")
    except ImportError as error:  # the package timm, which some towers need
        finding = Finding(family, reason=f"not in this environment: {str(error).strip().splitlines()[0]}")
    except Exception as error:  # noqa: BLE001  # any failure of a family belongs in the table
        if trace:
            traceback.print_exc()
        finding = Finding(family, reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")
    return dataclasses.replace(finding, seconds=time.perf_counter() - start)


Findings = Sequence[tuple[str, Finding]]  # (kind of layers, finding)


def page(findings: Findings, *, beside: tuple[str, list[Finding]] | None = None) -> str:
    """The text of docs/models.md.

    beside  another version of transformers, and the findings with it
    """
    here = [finding for _, finding in findings if finding.verdict != "not here"]
    exact = sum(finding.is_equal and finding.layout == "tree" for finding in here)
    padded = sum(finding.is_equal and finding.layout == "padded" for finding in here)
    timed = timed_examples()
    lines = [
        "# Families of models",
        "",
        f"Written by `python -m benchmarks.families --write` with transformers {transformers.__version__}, "
        f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}.",
        "Each family is a tiny model with random weights, in float32, with LoRA at the default settings. Nine records "
        "are arranged as `train` arranges them,",
        "and compared with plain transformers + PEFT, one record at a time.",
        "",
        "- *Apart*: the difference of the loss (relative), of the worst log-probability, and of the worst gradient of "
        "an adapter matrix (relative L2 norm).",
        "- *Noise*: the gradient's difference between two plain runs (another attention implementation, embeddings "
        "rounded differently).",
        f"- *Equal*: the loss differs by {_EQUAL_LOSS:.0e} or less and the gradient by {_EQUAL_GRADIENT:.0e} or less, "
        f"or by at most {_TIMES_NOISE:g} times the noise (gradients: {_MOST_GRADIENT:g} at most).",
        f"- *Speed*: forward and backward of {len(timed)} records after {_TIMED_TRUNK} shared tokens, as a tree "
        f"({len(graft(timed)):,} tokens) instead of padded rows ({padded_tokens(timed):,});",
        f"  the median of {_PAIRS} pairs on one CPU thread. These models are only {SIZE['hidden_size']} wide, so "
        "everything but the matrix products weighs more than in a real model.",
        "  Part of the gain of mamba, falcon_mamba, jamba and zamba is our scan, one operation per token; "
        "transformers' needs about ten.",
        "",
        f"**{len(here)} families: {exact} share prefixes (layout tree) and are equal, {padded} are trained on padded "
        f"rows and are equal, {len(here) - exact - padded} fail.**",
        "",
        "| layers | family | class | layout | equal | apart | noise | speed | LoRA on, or why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(kind, finding) for kind, finding in findings if finding.verdict != "not here"]
    missing = [finding.family for _, finding in findings if finding.verdict == "not here"]
    if missing:
        lines += [
            "",
            f"Not in this version of transformers, or from a package that is not installed: {', '.join(missing)}.",
        ]
    lines += ["", *_left_out()]
    if beside:
        lines += ["", *_differences(findings, *beside)]
    return "\n".join(lines) + "\n"


def listed() -> set[str]:
    """The names that this transformers lists as models that write text; some also read images or sound."""
    return {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }


def without_a_row() -> set[str]:
    """Listed names that have no row in the table."""
    return listed() - {family for _, family, _ in families()}


def _left_out() -> list[str]:
    """Lines for the page: the names without a row, and why."""
    lines = [f"## Without a row, among the {len(listed())} names that transformers lists as models that write text", ""]
    rest = without_a_row()
    for reason, names in LEFT_OUT.items():
        here = [name for name in names.split() if name in rest]
        if here:
            lines.append(f"- {len(here)} {reason}: {', '.join(here)}.")
        rest = rest - set(here)
    if rest:
        lines.append(f"- {len(rest)} not tried yet: {', '.join(sorted(rest))}.")
    return lines


def _line(kind: str, finding: Finding) -> str:
    apart = " · ".join(f"{figure:.0e}" for figure in finding.apart or ())
    layout = f"{finding.layout}: {finding.reason}" if finding.apart and finding.reason else finding.layout
    last = finding.adapted if finding.apart else finding.reason.replace("|", "/")
    noise = f"{finding.noise[2]:.0e}" if finding.apart else ""
    speed = f"{finding.faster:.1f} ×" if finding.faster else ""
    cells = (kind, finding.family, finding.class_name, layout, finding.verdict, apart, noise, speed, last)
    return f"| {' | '.join(cells)} |"


def _differences(findings: Findings, version: str, others: Sequence[Finding]) -> list[str]:
    """Lines for the page: the differences with another version of transformers."""
    now = {finding.family: finding for _, finding in findings}
    not_here = [other for other in others if other.verdict == "not here"]
    absent = [other.family for other in not_here if other.reason.startswith("not in transformers")]
    without_package = {other.family for other in not_here} - set(absent)
    lines = [f"## With transformers {version}", ""]
    lines.append("`python -m benchmarks.families --json FILE` with that version, then `--beside FILE` with this one.")
    exact = sum(other.is_equal and other.layout == "tree" for other in others)
    padded = sum(other.is_equal and other.layout == "padded" for other in others)
    here = len(others) - len(not_here)
    lines.append(
        f"{here} of these families: {exact} share prefixes and are equal, {padded} are trained on padded rows "
        "and are equal."
    )
    if absent:
        lines.append(f"Not in that version: {', '.join(absent)}.")
    if untried := sorted(without_package | now.keys() - {other.family for other in others}):
        lines.append(f"Not tried with that version: {', '.join(untried)}.")
    differ = []
    for other in others:
        this = now[other.family]
        if other.verdict == "not here" or (other.verdict, other.layout) == (this.verdict, this.layout):
            continue
        differ.append(f"- {other.family}: {other.layout or 'fails'}, {other.verdict}. {other.reason}".rstrip())
    return [
        *lines,
        *(
            ["", "Different from the table above:", "", *differ]
            if differ
            else ["All others are as in the table above."]
        ),
    ]


def _saved(findings: Findings) -> str:
    of_families = [vars(finding) for _, finding in findings]
    return json.dumps({"transformers": transformers.__version__, "findings": of_families}, indent=1)


def _read(file: Path) -> tuple[str, list[Finding]]:
    saved = json.loads(file.read_text(encoding="utf-8"))
    return saved["transformers"], [Finding(**finding) for finding in saved["findings"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    parser.add_argument("--beside", type=Path, help="such a file of another transformers: what is otherwise there")
    parser.add_argument("--trace", action="store_true", help="print the traceback of what fails")
    parser.add_argument("--seconds", type=int, default=300, help="limit for each family")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    findings = []
    for kind, family, values in families():
        if chosen.families and family not in chosen.families:
            continue
        finding = tried(family, values, limit=chosen.seconds, trace=chosen.trace)
        apart = " ".join(f"{figure:.0e}" for figure in finding.apart or ())
        start = f"{family:18} {finding.layout:7} {finding.verdict:8} {apart:18} noise {finding.noise[2]:.0e}"
        speed = f"{finding.faster:.1f} ×" if finding.faster else ""
        print(f"{start} {speed:7} {finding.seconds:4.1f} s  {finding.reason}", flush=True)
        findings.append((kind, finding))
    text = page(findings, beside=_read(chosen.beside) if chosen.beside else None)
    print(text.split("**")[1])
    if chosen.json:
        chosen.json.write_text(_saved(findings), encoding="utf-8")
    if chosen.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
