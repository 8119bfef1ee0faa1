"""HTML page: the report of inspect as one file that opens from disk and loads nothing.

The texts of records are in the page as JSON without any `<`, and are shown only as text nodes. The page's content
security policy allows only its own script, by hash. A record that contains `</script>` stays text.
"""

import base64
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from atomtune.analysis.near_duplicates import equal_groups
from atomtune.choices import CHECKS, Check
from atomtune.data.reading.raw import printable
from atomtune.data.records import Example
from atomtune.disk import write_text
from atomtune.errors import BadSettings
from atomtune.inspect.checks import MEANINGS, near_or_equal
from atomtune.inspect.histogram import Bar, histogram, percentiles
from atomtune.inspect.report import Report
from atomtune.inspect.terminal import scripts
from atomtune.inspect.tokens import TokenDecoder
from atomtune.language import in_chinese, language_spoken, singular

#: Limits of the page's content, with which a browser still searches it without delay.
MOST_RECORDS, MOST_TOKENS, MOST_REFUSED = 2000, 600_000, 500
#: Check → (English name, Chinese name).
LABELS: Mapping[Check, tuple[str, str]] = {
    "refused": ("Refused", "被拒绝"),
    "cut": ("Shortened", "被缩短"),
    "duplicates": ("Exact copies", "完全重复"),
    "near_duplicates": ("Near copies", "近似重复"),
    "conflicts": ("Different answers", "回答不一"),
    "control": ("Special tokens as text", "文本中的特殊词元"),
    "blank": ("Blank answers", "空白回答"),
    "one_token": ("One-token answers", "单词元回答"),
    "no_stop": ("No stop token", "缺停止符"),
    "unknown": ("Unknown tokens", "未知词元"),
}
SCRIPT_NAMES = {
    "Han": ("Han (Chinese characters)", "汉字"),
    "Latin": ("Latin", "拉丁字母"),
    "Kana": ("Kana (Japanese)", "日文假名"),
    "Hangul": ("Hangul (Korean)", "韩文"),
    "Cyrillic": ("Cyrillic", "西里尔字母"),
    "Arabic": ("Arabic", "阿拉伯字母"),
    "other": ("other", "其他"),
}


def write_page(report: Report, path: Path, decoder: TokenDecoder, *, seed: int) -> None:
    """Write the page to a temporary file and rename it, so that `path` is never half-written.

    Raises BadSettings if it cannot be written.
    """
    text = page(report, decoder, seed=seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise BadSettings([f"--html {path}: cannot be written there: {error.strerror}. Use another path."]) from None


def page(report: Report, decoder: TokenDecoder, *, seed: int) -> str:
    """The report as HTML."""
    files = resources.files("atomtune.inspect") / "html"
    script = (files / "page.js").read_text(encoding="utf-8")
    script_hash = hashlib.sha256(script.encode()).digest()
    ledger = report.ledger
    rows = chosen_rows(report, seed=seed)
    refused = ledger.records_refused[:MOST_REFUSED]
    data = page_data(report, rows, decoder)
    data["refused"] = [(refusal.origin, refusal.reason, in_chinese(refusal.reason)) for refusal in refused]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["singular"] = singular
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        language=language_spoken(),
        in_chinese=in_chinese,
        title=", ".join(printable(Path(source).name) for source in report.sources),
        report=report,
        ledger=ledger,
        target_tokens=ledger.target_tokens + ledger.target_tokens_refused,
        findings=[
            (report.findings[check], MEANINGS[check], *LABELS[check], in_chinese(MEANINGS[check])) for check in CHECKS
        ],
        lengths=_lengths(report),
        scripts=[(*SCRIPT_NAMES.get(name, (name, name)), share) for name, share in scripts(report)],
        shown=len(rows),
        shown_refused=len(refused),
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(script_hash).decode(),
        data=_as_json(data),
    )


def _lengths(report: Report) -> list[tuple[str, str, dict[str, int], list[tuple[Bar, float]]]]:
    """For each kind of length: (English name, Chinese name, percentiles, bars with their heights)."""
    tokens = report.tokens
    lengths = []
    for english, chinese, values in (
        ("Whole record", "整条记录", tokens.longest),
        ("Read only, per record", "只读部分（每条记录）", tokens.read),
        ("Learned, per answer", "学习部分（每个回答）", tokens.answers),
    ):
        lengths.append((english, chinese, percentiles(values), _with_heights(histogram(values))))
    return lengths


def chosen_rows(report: Report, *, seed: int) -> list[int]:
    """The rows that the page shows: an equal share for each check, then its other rows, then a random sample."""
    rows_by_check = [finding.rows.tolist() for finding in report.findings.values()]
    share = MOST_RECORDS // len(rows_by_check)
    total = len(report.stored)
    wanted: list[int] = []
    for rows in rows_by_check:
        wanted += rows[:share]
    for rows in rows_by_check:
        wanted += rows[share:]
    wanted += random.Random(seed).sample(range(total), min(total, MOST_RECORDS))
    chosen: list[int] = []
    tokens = 0
    for row in dict.fromkeys(wanted):  # each once
        tokens += int(report.tokens.longest[row])
        if len(chosen) == MOST_RECORDS or (tokens > MOST_TOKENS and chosen):
            break
        chosen.append(row)
    return chosen


def page_data(report: Report, rows: Sequence[int], decoder: TokenDecoder) -> dict[str, Any]:
    """The chosen records and the problems of each, in the form that page.js reads."""
    pieces: dict[int, tuple[str, bool]] = {}  # token id → (text, whether it is a control token)
    records: list[dict[str, Any]] = []
    for row in rows:
        examples = report.examples(row)
        for example in examples:
            for token_id in set(example.ids) - pieces.keys():
                pieces[token_id] = (decoder(token_id), token_id in decoder.control)
        runs = [_as_runs(example) for example in examples]
        records.append({"origin": report.origin(row), "problems": {}, "examples": runs})
    places = _places_by_check(report, rows)
    firsts = _firsts_of_groups(report)
    for check, check_places in places.items():
        for place in check_places:
            row = rows[place]
            first = int(firsts[check][row]) if check in firsts else row
            records[place]["problems"][check] = report.origin(first) if first != row else ""
    return {"pieces": pieces, "records": records, "problems": places}


def _places_by_check(report: Report, rows: Sequence[int]) -> dict[str, list[int]]:
    """For each check, the indices in `rows` of the records that it found."""
    place_of = {row: place for place, row in enumerate(rows)}
    places: dict[str, list[int]] = {}
    for check, finding in report.findings.items():
        places[check] = [place_of[row] for row in finding.rows.tolist() if row in place_of]
    return places


def _firsts_of_groups(report: Report) -> dict[str, NDArray[numpy.int64]]:
    """For each check that finds groups: [N] the first record of each record's group, which is shown with it."""
    return {
        "duplicates": report.tokens.copies,
        "near_duplicates": near_or_equal(report.texts, report.tokens),
        "conflicts": equal_groups(report.texts.prompts),
    }


def _as_runs(example: Example) -> dict[str, Any]:
    """The ids, and the learn marks run-length encoded as (number of tokens, learn): 0 0 0 1 1 is (3, 0) (2, 1)."""
    runs = [(len(list(run)), learn) for learn, run in groupby(example.learn)]
    return {"ids": example.ids, "runs": runs}


def _as_json(value: Any) -> str:
    """JSON without `<`, `>` or `&`, which is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _with_heights(bars: Sequence[Bar]) -> list[tuple[Bar, float]]:
    """Each bar with its height relative to the highest, which has 1."""
    most = max((bar.count for bar in bars), default=1)
    return [(bar, bar.count / most) for bar in bars]
