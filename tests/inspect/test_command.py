"""Inspect: the ledger adds up, problems in a file are found, and the checks for a data repository work."""

import io
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from atomtune.choices import CHECKS
from atomtune.cli import main
from atomtune.console import Console
from atomtune.data.records import Example
from atomtune.inspect.html_page import LABELS
from atomtune.inspect.tokens import CONTROL_LEARNED, LEARNED, TokenDecoder, coloured, show, with_marks
from tests.conftest import DIALOGUES, SHARED_DATA, write_jsonl
from tests.tiny import CHATML, tokenizer_of

STORY = "Once upon a time there was a lighthouse on a small island, and a keeper who never slept."
#: At least one record for every problem that a file can have.
TROUBLED = [
    *DIALOGUES,
    DIALOGUES[0],
    {"instruction": "Tell me a story.", "input": "", "output": STORY},
    {"instruction": "Tell me a story.", "input": "", "output": STORY + "!"},
    {"instruction": "Say </s> please", "input": "", "output": "No <s> here"},
    {"instruction": "x", "input": "", "output": "5"},
    {"instruction": "word " * 300, "input": "", "output": "A long question."},
    {"instruction": "why", "input": "", "output": "word " * 300},
    {"instruction": "no answer"},
]
FOUND = {"refused": 2, "cut": 1, "duplicates": 1, "near_duplicates": 1, "conflicts": 2, "control": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tokenizer and no model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer_of("sentencepiece").save_pretrained(folder)
    return folder


@pytest.fixture
def troubled(tmp_path):
    return write_jsonl(tmp_path / "troubled.jsonl", TROUBLED)


def inspected(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["inspect", "--max_seq_length", "256", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_json_output_is_alone_on_stdout_and_its_counts_add_up(base, troubled, capsys):
    code, out, err = inspected(capsys, troubled, "--model_path", base, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["records_read"] == len(TROUBLED) == told["records_used"] + len(told["records_refused"])
    assert sorted(one["origin"] for one in told["records_refused"]) == ["troubled.jsonl:15", "troubled.jsonl:16"]
    assert told["records_cut"] == 1
    assert "Records and tokens" in err


def test_every_printed_sum_adds_up(base, troubled, capsys):
    _, out, _ = inspected(capsys, troubled, "--model_path", base)
    sums = re.findall(r"([\d,]+) read = ([\d,]+) used \+ ([\d,]+) refused", out)
    assert len(sums) == 2
    for line in sums:
        read, used, refused = (int(number.replace(",", "")) for number in line)
        assert read == used + refused


def test_each_problem_is_counted_and_located(base, troubled, capsys):
    _, out, _ = inspected(capsys, troubled, "--model_path", base, "--samples", "0")
    lines = out[out.index("\nProblems") :].splitlines()
    told = {line.split()[0]: line.split()[1] for line in lines if line.split() and line.split()[0] in CHECKS}
    told = {name: int(count) for name, count in told.items()}
    assert {name: told[name] for name in FOUND} == FOUND
    places = {line.split()[0]: lines[i + 1] for i, line in enumerate(lines) if line.split() and line.split()[0] in told}
    assert places["duplicates"].strip() == "troubled.jsonl:1, troubled.jsonl:9"
    assert places["near_duplicates"].strip() == "troubled.jsonl:10, troubled.jsonl:11"
    assert places["cut"].strip() == "troubled.jsonl:14"
    assert places["control"].strip() == "troubled.jsonl:12"
    assert "troubled.jsonl:13" in places["one_token"]
    nothing = next(line for line in lines if "nothing found by" in line)
    assert all(name in nothing or told.get(name) for name in CHECKS)


def test_a_refused_record_is_listed_with_its_reason(base, troubled, capsys):
    _, out, _ = inspected(capsys, troubled, "--model_path", base)
    assert 'troubled.jsonl:16  no key "output"' in out


def test_a_template_that_does_not_fit_the_tokenizer_is_reported(base, troubled, capsys):
    _, out, _ = inspected(capsys, troubled, "--model_path", base, "--template", "chatml")
    assert "<|im_end|>, <|im_start|> of this template are plain text to this tokenizer" in out
    _, out, _ = inspected(capsys, troubled, "--model_path", base)
    assert "text to this tokenizer" not in out


def test_a_problem_is_attributed_to_the_right_one_of_two_files_of_one_name(base, tmp_path, capsys):
    # Catches looking for train.jsonl:1 in both files.
    for folder, question in (("a", "word " * 300), ("b", "word")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "train.jsonl", [{"instruction": question, "output": f"An answer of {folder}."}])
    both = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    code, out, _ = inspected(capsys, *both, "--model_path", base, "--samples", "0")
    assert code == 0
    assert re.search(r"^ *cut +1 .*\n +a/train\.jsonl:1$", out, re.MULTILINE), "one place, not two of one name"


def test_an_unwritable_html_page_is_reported_without_a_traceback(base, troubled, capsys):
    code, _, err = inspected(capsys, troubled, "--model_path", base, "--html", troubled / "report.html")
    assert code == 2
    assert "report.html: cannot be written" in err
    assert "Traceback" not in err


def test_a_stop_token_that_is_also_the_unknown_token_is_not_reported_as_unknown(tmp_path, capsys):
    # GPT-2 has one token for both: every record was reported, and --fail_on unknown always failed.
    tokenizer = tokenizer_of("bytes")
    tokenizer.unk_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    data = write_jsonl(tmp_path / "train.jsonl", DIALOGUES)
    words = [data, "--model_path", tmp_path / "base", "--template", "plain", "--fail_on", "unknown"]
    code, out, _ = inspected(capsys, *words)
    assert code == 0
    assert "unknown" in next(line for line in out.splitlines() if "nothing found by" in line)


def test_unknown_tokens_in_answers_are_reported(tmp_path, capsys):
    tokenizer_of("characters").save_pretrained(tmp_path / "base")
    records = [{"instruction": "Who", "output": "I keep"}, {"instruction": "Who", "output": "I ℵ keep"}]
    data = write_jsonl(tmp_path / "train.jsonl", records)
    words = [data, "--model_path", tmp_path / "base", "--template", "plain", "--fail_on", "unknown=1"]
    code, out, _ = inspected(capsys, *words)
    assert code == 0
    assert re.search(r"^ *unknown +1 .*\n +train\.jsonl:2$", out, re.MULTILINE)


def test_no_record_text_is_printed_with_zero_samples(base, troubled, capsys):
    _, out, err = inspected(capsys, troubled, "--model_path", base, "--samples", "0")
    assert "lighthouse" not in out + err
    assert "灯" not in out + err


def test_the_suggested_length_shortens_no_record(base, troubled, capsys):
    _, out, _ = inspected(capsys, troubled, "--model_path", base)
    suggested = next(line for line in out.splitlines() if "suggested: " in line).split()[1].rstrip(",")
    code, out, _ = inspected(
        capsys, troubled, "--model_path", base, "--max_seq_length", suggested.replace(",", ""), "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert told["records_cut"] == 0
    assert len(told["records_refused"]) == 1  # the record without an answer; the long one is not refused


@pytest.mark.parametrize(
    ("words", "failing"),
    [
        (["duplicates", "cut"], ["duplicates", "cut"]),
        (["duplicates=1", "cut=1", "refused=2"], []),
        (["duplicates=6%,refused=12%"], ["duplicates", "refused"]),  # 1 and 2 of 16 records are 6.25 % and 12.5 %
        (["duplicates=6.25%,refused=12.5%"], []),
        (["refused=1"], ["refused"]),
        (["no_stop", "blank", "unknown"], []),
        (["near_duplicates", "control", "conflicts=1"], ["near_duplicates", "control", "conflicts"]),
    ],
)
def test_fail_on_exits_with_4_if_more_problems_are_found_than_allowed(base, troubled, capsys, words, failing):
    code, _, err = inspected(capsys, troubled, "--model_path", base, "--fail_on", *words)
    assert code == (4 if failing else 0)
    assert [line.split(":")[0] for line in err.splitlines() if "allowed" in line] == failing


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("duplicats", "did you mean duplicates?"),
        ("xyzzy", "known: refused, cut"),
        ("cut=", "not a limit"),
        ("cut=many", "not a limit"),
        ("cut=-1", "not a limit"),
        ("cut=nan", "not a limit"),
        ("cut=101%", "not a limit"),
    ],
)
def test_an_invalid_fail_on_value_is_refused_before_anything_is_read(base, capsys, word, said):
    code, _, err = inspected(capsys, "there-is-no-such-file.jsonl", "--model_path", base, "--fail_on", word)
    assert code == 2
    assert said in err
    assert "no such file" not in err


def test_the_output_ends_with_the_train_command_to_run_next(base, troubled, capsys):
    of_the_run = ["--learn", "last", "--per_device_train_batch_size", "16"]
    _, out, _ = inspected(capsys, troubled, "--model_path", base, *of_the_run)
    named = ["--model_path", str(base), "--dataset_path", str(troubled), "--max_seq_length", "256", *of_the_run]
    named.append("--skip_bad")  # one record has no answer, and train would stop there
    assert "broken records, 1 of 16: train stops at them" in out
    assert sorted(out.splitlines()[-1].split(" train ")[1].split()) == sorted(named)


def test_all_missing_required_flags_are_reported_at_once(capsys):
    code, _, err = inspected(capsys)
    assert code == 2
    assert "--dataset_path" in err
    assert "--model_path" in err


def test_a_folder_as_the_html_path_is_refused(base, troubled, tmp_path, capsys):
    code, _, err = inspected(capsys, troubled, "--model_path", base, "--html", tmp_path)
    assert code == 2
    assert "a folder; expected the name of a file" in err


def test_several_files_are_one_data_set(base, tmp_path, capsys):
    one = write_jsonl(tmp_path / "one.jsonl", DIALOGUES[:5])
    two = write_jsonl(tmp_path / "two.jsonl", DIALOGUES[3:])
    code, out, err = inspected(capsys, one, two, "--model_path", base, "--json")
    told = json.loads(out)
    assert (code, told["records_read"], told["records_copied"]) == (0, 10, 2)
    assert "one.jsonl:4, two.jsonl:1, one.jsonl:5" in err


@pytest.mark.parametrize(("pairs", "places"), [(1, "a:1, a:2"), (2, "a:1, a:2, a:3 …"), (3, "a:1, a:2, a:3 …")])
def test_places_that_are_not_shown_are_marked(base, tmp_path, capsys, pairs, places):
    # Regression: of two pairs of copies, of which the later ones are counted, the last place was left out unsaid.
    file = write_jsonl(tmp_path / "a.jsonl", [record for record in DIALOGUES[:pairs] for _ in range(2)])
    _, out, _ = inspected(capsys, file, "--model_path", base, "--samples", "0")
    lines = [line.strip() for line in out.splitlines()]
    (at,) = [number for number, line in enumerate(lines) if line.startswith("duplicates ")]
    assert lines[at + 1] == places.replace("a:", "a.jsonl:")


def test_a_file_without_usable_records_still_gets_a_report(base, tmp_path, capsys):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": ""}, {"instruction": "", "output": "b"}])
    code, out, err = inspected(capsys, file, "--model_path", base, "--html", tmp_path / "report.html", "--json")
    assert code == 2
    assert json.loads(out)["records_used"] == 0
    assert "2 read = 0 used + 2 refused" in err
    # Terminal and page have no empty tables, only the ledger and the problems.
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("Lengths", "Shared prefixes", "Writing", "Which max_seq_length"):
        assert title not in err and title not in page.partition("</main>")[0]
    assert "bad.jsonl:2  instruction and input are both empty" in err
    assert err.endswith("bad.jsonl: none of 2 records can be used. Fix the records listed above.\n")
    # A requested check is answered first.
    assert inspected(capsys, file, "--model_path", base, "--fail_on", "refused")[0] == 4
    assert inspected(capsys, file, "--model_path", base, "--fail_on", "cut")[0] == 2


def test_a_length_is_suggested_even_if_every_record_is_too_long(base, tmp_path, capsys):
    file = write_jsonl(tmp_path / "long.jsonl", [{"instruction": "a", "output": "word " * 300}] * 2)
    code, out, _ = inspected(capsys, file, "--model_path", base, "--html", tmp_path / "report.html")
    assert code == 2 and "2 refused" in out
    suggested = re.search(r"suggested: ([\d,]+), shortens nothing", out)[1]
    assert f"<b>{suggested}</b>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert inspected(capsys, file, "--model_path", base, "--max_seq_length", suggested.replace(",", ""))[0] == 0


def test_a_histogram_starts_at_the_shortest_record(base, tmp_path, capsys):
    file = write_jsonl(tmp_path / "one.jsonl", [{"instruction": "q", "output": "a"}])
    _, out, _ = inspected(capsys, file, "--model_path", base)
    bars = [line.split() for line in out.splitlines() if "█" in line]
    ranges = [[int(end) for end in bar[0].split("–")] for bar in bars]
    lengths = out.splitlines()[out.splitlines().index("Lengths, in tokens") + 2 :]
    longest = [int(line.split()[-1]) for line in lengths[:2]]
    assert all(ends[0] <= length <= ends[-1] for ends, length in zip(ranges, longest, strict=True))  # one bar each
    assert "3–3" not in out
    assert not [line for line in out.splitlines() if line.strip().endswith("  0")]
    assert "the same 0 tokens" not in out


def test_records_of_a_one_line_json_array_keep_texts_and_tokens_paired(base, tmp_path, capsys):
    # All of its values have the same origin, and a value in the middle is refused.
    file = tmp_path / "array.json"
    file.write_text(json.dumps([*DIALOGUES[:2], {"instruction": "x"}, *DIALOGUES[:2]]), encoding="utf-8")
    code, out, _ = inspected(capsys, file, "--model_path", base, "--json")
    assert (code, json.loads(out)["records_copied"]) == (0, 2)


def test_duplicates_and_shared_prefixes_of_the_dialogues_file_are_found(tmp_path, capsys):
    if not SHARED_DATA.is_file():
        pytest.skip("the dialogues' file is not here")
    values = [json.loads(line) for line in SHARED_DATA.read_text(encoding="utf-8").splitlines()]
    corpus = [value[key] for value in values for key in ("instruction", "output")]
    tokenizer_of("sentencepiece", corpus=corpus).save_pretrained(tmp_path / "base")
    code, out, _ = inspected(capsys, SHARED_DATA, "--model_path", tmp_path / "base")
    assert code == 0
    assert "3,729 read = 3,729 used + 0 refused" in out
    assert next(line for line in out.splitlines() if line.split()[:1] == ["duplicates"]).split()[1] == "112"
    tree = next(line for line in out.splitlines() if line.split()[:1] == ["tree"])
    assert float(tree.split()[2].rstrip("×")) > 1.5
    assert "Han 100.0%" in out


def test_no_model_is_loaded(base, troubled):
    # The folder has a tokenizer and no model, so loading one would fail.
    run = subprocess.run(
        [sys.executable, "-m", "atomtune", "inspect", str(troubled), "--model_path", str(base)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_every_check_has_its_labels():
    assert list(LABELS) == list(CHECKS)


def test_styles_mark_which_tokens_are_learned(base):
    tokenizer = tokenizer_of("sentencepiece")
    ids = tuple(tokenizer("你好 world\n", add_special_tokens=False)["input_ids"])
    example = Example((1, *ids, 2), (0, *[0] * (len(ids) - 1), 1, 1), "a:1")
    text = coloured(example.ids, example.learn, TokenDecoder(tokenizer))
    assert [span.end - span.start > 0 for span in text.spans] == [True] * len(example.ids)
    learned = {str(style) for style in (*LEARNED, CONTROL_LEARNED)}
    assert [str(span.style) in learned for span in text.spans] == [bool(learn) for learn in example.learn]
    plain = coloured(example.ids, example.learn, TokenDecoder(tokenizer), colour=False).plain
    assert plain.startswith("<s>│")
    assert plain.replace("\n", "").endswith("⟦↵│</s>⟧")


@pytest.mark.parametrize("colour", [True, False])
def test_token_lines_fit_the_width_and_break_between_tokens(colour):
    tokenizer = tokenizer_of("sentencepiece")
    ids = tuple(
        tokenizer("你好 world 有雾，看不见 once upon a time there was a lamp", add_special_tokens=False)["input_ids"]
    )
    decoder, learned = TokenDecoder(tokenizer), (0,) * len(ids)
    lines = coloured(ids, learned, decoder, colour=colour, width=12).plain.split("\n")
    assert max(map(cell_len, lines)) <= 12 < cell_len("".join(lines))
    starts = set(itertools.accumulate(len(decoder(token_id)) for token_id in ids))
    ends = itertools.accumulate(len(line.replace("│", "")) for line in lines)
    assert starts.issuperset(ends)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "characters"])
def test_decoded_tokens_concatenate_to_the_text_with_visible_spaces(kind):
    tokenizer = tokenizer_of(kind, CHATML if kind == "bytes" else None)
    decoder = TokenDecoder(tokenizer)
    for text in ("你好 世界", "Hello,  world 12", "有雾，\n看不见"):
        if kind == "characters" and not set(text) <= tokenizer.get_vocab().keys():
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = "".join(decoder(number) for number in ids)
        raw = bytearray()
        while seen:  # ⟨E4⟩ becomes its byte again
            if seen[0] == "⟨":
                raw += bytes([int(seen[1:3], 16)])
                seen = seen[4:]
            else:
                raw += seen[0].encode()
                seen = seen[1:]
        assert raw.decode().replace("·", " ").replace("↵", "\n").strip(" ") == text


@pytest.mark.parametrize(("piece", "shown"), [(" a", "·a"), ("\x1b[31m", "⟨1B⟩[31m"), ("\u202e", "⟨202E⟩"), ("", "⟨⟩")])
def test_invisible_characters_in_a_token_are_made_visible(piece, shown):
    assert with_marks(piece) == shown


def test_only_the_end_of_a_long_record_is_shown():
    tokenizer = tokenizer_of("characters")
    example = Example((1, *[5] * 50, 2), (0, *[0] * 49, 1, 1), "a:1")
    console = Console()
    console.file, console.width = io.StringIO(), 200
    show(console, [example], TokenDecoder(tokenizer), part=10)
    said = console.file.getvalue()
    assert "the first 42 are not shown" in said
    assert said.rstrip().endswith("</s>⟧")
