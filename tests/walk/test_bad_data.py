"""Every kind of bad file gives its place and a remedy: exit code 2, no traceback, no text of a record."""

import codecs
import gzip
import json
import os
import shlex

import pytest

from atomtune.cli import main
from tests.conftest import write_jsonl

SECRET = "my-secret-words"
GOOD = [{"instruction": f"{SECRET} {n}", "input": "", "output": f"answer {n}"} for n in range(4)]


def line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


FILE = b"".join(map(line, GOOD))


def behind(*raw: bytes) -> bytes:
    """Put these lines after four good ones, so that they begin at line 5."""
    return FILE + b"\n".join(raw)


CHINESE = json.dumps({"instruction": "你好，请问", "output": "再见"}, ensure_ascii=False) + "\n"

#: name → (content, place in the message, text of the message)
CLASSES: dict[str, tuple[bytes, str, str]] = {
    "invalid JSON": (behind(b'{"instruction": "x", output: "y"}'), ":5", "not JSON at column 22"),
    "truncated last line": (FILE[:-9], ":4", "not JSON at column"),
    "byte-order mark in the middle": (FILE + codecs.BOM_UTF8 + FILE, ":5", "byte-order mark in the middle"),
    "half a character of UTF-16": (FILE.decode().encode("utf-16") + b"x", ":5", "not UTF-16"),
    "half a character of UTF-16 without a mark": (FILE.decode().encode("utf-16-le") + b"x", ":5", "not UTF-16-LE"),
    "half a character of UTF-32": (FILE.decode().encode("utf-32") + b"x", ":5", "not UTF-32"),
    "GBK": (CHINESE.encode("gbk"), ":1", "iconv -f GB18030 -t UTF-8"),
    "GB18030": (CHINESE.replace("好", "㐀").encode("gb18030"), ":1", "iconv -f GB18030 -t UTF-8"),
    "Latin-1": (b'{"instruction": "x", "output": "caf\xe9"}', ":1", "not UTF-8 at byte 36"),
    "NUL bytes": (behind(b"\0" * 4096), ":5", "NUL bytes"),
    "NUL in a text": (behind(b'{"instruction": "x\0", "output": "y"}'), ":5", "NUL bytes"),
    "control character": (behind(b'{"instruction": "x\x01", "output": "y"}'), ":5", "a control character in a text"),
    "lone surrogate": (behind(b'{"instruction": "\\ud83d", "output": "y"}'), ":5", "half a surrogate pair"),
    "missing key": (behind(line({"instruction": SECRET})), ":5", 'no key "output"; keys here: instruction'),
    "misspelt key": (behind(line({"instruction": SECRET, "ouput": "y"})), ":5", "keys here: instruction, ouput"),
    "number": (behind(line({"instruction": SECRET, "output": 5})), ":5", "output is a number; expected text"),
    "null output": (behind(line({"instruction": SECRET, "output": None})), ":5", "output is null; expected text"),
    "empty output": (behind(line({"instruction": SECRET, "output": " \n"})), ":5", "output is empty"),
    "empty question": (behind(line({"instruction": "", "output": "y"})), ":5", "instruction and input are both empty"),
    "NaN": (behind(b'{"instruction": "x", "output": "y", "score": NaN}'), ":5", "NaN is not a JSON value"),
    "nested arrays": (behind(line([[GOOD[0]]])), ":5", "a list; expected an object"),
    "a value that is text": (behind(line(SECRET)), ":5", "text; expected an object"),
    "a key twice": (behind(b'{"instruction": "x", "output": "y", "output": "z"}'), ":5", '"output" appears twice'),
    "two records on a line": (behind(FILE.replace(b"\n", b" ")), ":5", "text after the end of the record"),
    "pretty-printed": (json.dumps(GOOD[0], indent=1).encode(), ":1", "expected one record per line"),
    "array that breaks": (b"[" + FILE.replace(b"\n", b",\n"), ":5", "the JSON array breaks here"),
    "nested too deeply": (behind(b'{"output": ' + b"[" * 200_000), ":5", "cannot be read"),
    "CSV": (b"instruction,input,output\n" + SECRET.encode() + b",,y\n", ":1", "/records.csv"),
    "TSV": (b"instruction\toutput\n" + SECRET.encode() + b"\ty\n", ":1", "/records.tsv"),
    "half a gzip file": (gzip.compress(FILE)[:-9], ":", "ends in the middle"),
    "bad line in gzip": (gzip.compress(behind(b'{"output": ')), ":5", "not JSON at column"),
    "Parquet": (b"PAR1" + bytes(range(256)), "", "Parquet that cannot be read"),
    "Arrow": (b"ARROW1" + bytes(range(256)), "", "Arrow that cannot be read"),
    "zip": (b"PK\x03\x04" + bytes(range(256)), "", "a zip (or xlsx) file"),
    "empty file": (b"", "", "the file is empty"),
    "blank lines alone": (b"\n \r\n\n", "", "the file is empty"),
    "a line beyond all bounds": (FILE + b'{"instruction": "' + b"x" * (5 << 20) + b'"}\n', ":5", "at most 4 MB"),
}


def train(base, data, out, *more) -> int:
    flags = ["--dataset_path", str(data), "--output_dir", str(out), "--max_steps", "1", *more]
    return main(["train", "--model_path", str(base), *flags])


@pytest.mark.parametrize("name", CLASSES, ids=list(CLASSES))
def test_a_bad_file_is_refused_with_place_and_cause_but_no_record_text(models, tmp_path, capsys, name):
    content, place, said = CLASSES[name]
    data = tmp_path / "records.jsonl"
    data.write_bytes(content)
    assert train(models("llama"), data, tmp_path / "out") == 2
    told = capsys.readouterr()
    assert f"records.jsonl{place}" in told.err
    assert said in told.err
    assert "Traceback" not in told.err
    record = (tmp_path / "out" / "run.json").read_text()
    assert json.loads(record)["status"] == "failed"
    for text in (told.out, told.err, record):
        assert SECRET not in text
    refused = json.loads(record).get("records_refused", [])
    assert bool(refused) == ("\nrun.json lists them all.\n" in told.err)


@pytest.mark.parametrize("kind", ["folder", "missing", "FIFO", "link to nowhere"])
def test_a_dataset_path_that_is_not_a_file_is_refused(models, tmp_path, capsys, kind):
    data = tmp_path / "records.jsonl"
    if kind == "folder":
        data.mkdir()
    elif kind == "FIFO":
        os.mkfifo(data)
    elif kind == "link to nowhere":
        data.symlink_to(tmp_path / "nowhere")
    assert train(models("llama"), data, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "records.jsonl: no" in told or "records.jsonl: a folder without data files" in told
    assert "--dataset_path" in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_reported(models, dialogues, tmp_path, capsys):
    dialogues.chmod(0)
    assert train(models("llama"), dialogues, tmp_path / "out") == 2
    assert "cannot be read: Permission denied" in capsys.readouterr().err


def test_all_bad_records_are_reported_at_once_and_listed_in_run_json(models, tmp_path, capsys):
    data = tmp_path / "records.jsonl"
    data.write_bytes(FILE + b"broken\n" * 30 + b'{"instruction": "Hello"}\n')
    assert train(models("llama"), data, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.count("not JSON") == 3, "a common reason hides no other"
    assert (
        'records.jsonl:35  no key "output"; keys here: instruction.\n… and 27 more.\nrun.json lists them all.' in told
    )
    assert "31 of 35 records refused. --skip_bad trains on the other 4." in told
    refused = json.loads((tmp_path / "out" / "run.json").read_text())["records_refused"]
    assert [one["origin"] for one in refused] == [f"records.jsonl:{n}" for n in range(5, 36)]


BROKEN = {"instruction": SECRET}
TOO_LONG = {"instruction": SECRET, "output": "word " * 4000}


def ended(command, *words, capsys) -> tuple[int, str]:
    """The exit code, and the message after the command's name."""
    capsys.readouterr()
    code = main([command, *map(str, words)])
    return code, capsys.readouterr().err.rpartition(f"atomtune {command}: ")[2]


@pytest.mark.parametrize("command", ["train", "inspect", "verify", "plan", "evaluate"])
def test_a_file_without_usable_records_fails_every_command_the_same_way(models, tmp_path, capsys, command):
    data = write_jsonl(tmp_path / "records.jsonl", [BROKEN, TOO_LONG, {"instruction": "a", "output": " "}])
    more = ["--output_dir", tmp_path / "out"] if command in ("train", "evaluate") else []
    code, told = ended(command, "--dataset_path", data, "--model_path", models("llama"), *more, capsys=capsys)
    assert code == 2
    lines = told.splitlines()
    assert sorted(words.split()[0] for words in lines[:3]) == [f"records.jsonl:{n}" for n in (1, 2, 3)]
    assert lines[3:-1] == (["run.json lists them all."] if command == "train" else [])
    assert lines[-1].endswith("records.jsonl: none of 3 records can be used. Fix the records listed above.")


@pytest.mark.parametrize("command", ["inspect", pytest.param("verify", marks=pytest.mark.slow)])
@pytest.mark.parametrize("records", [[BROKEN], [TOO_LONG], [BROKEN, TOO_LONG], []], ids=["bad", "long", "both", "none"])
def test_the_suggested_train_command_runs(models, tmp_path, capsys, command, records):
    data = write_jsonl(tmp_path / "records.jsonl", [*GOOD, *records])
    assert main([command, "--dataset_path", str(data), "--model_path", str(models("llama"))]) == 0
    named = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(" train ")[2])
    assert main(["train", *named, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 0


@pytest.mark.parametrize(
    "more",
    [[BROKEN], [BROKEN, TOO_LONG], "--eval_size=4", "--eval_size=0.1", "--eval_path={bad}", "--eval_path=nowhere"],
    ids=["broken", "broken and long", "all held out", "none held out", "broken to evaluate", "nothing to evaluate"],
)
def test_plan_is_refused_with_the_same_message_as_train(models, tmp_path, capsys, more):
    data = write_jsonl(tmp_path / "records.jsonl", [*GOOD, *(more if isinstance(more, list) else [])])
    bad = write_jsonl(tmp_path / "bad.jsonl", [*GOOD, BROKEN])
    words = ["--dataset_path", data, "--model_path", models("llama"), "--output_dir", tmp_path / "out"]
    words += [more.format(bad=bad)] if isinstance(more, str) else []
    run = ended("train", *words, capsys=capsys)
    assert run[0] == 2
    assert ended("plan", *words, capsys=capsys) == (2, run[1].replace("run.json lists them all.\n", ""))


def test_the_announced_number_of_skip_bad_records_is_correct(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "records.jsonl", [*GOOD, BROKEN, TOO_LONG])
    words = ["--dataset_path", data, "--model_path", models("llama"), "--output_dir", tmp_path / "out"]
    _, told = ended("train", *words, "--max_steps", 1, capsys=capsys)
    assert "2 of 6 records refused. --skip_bad trains on the other 4." in told
    assert ended("train", *words, "--max_steps", 1, "--skip_bad", capsys=capsys)[0] == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["records_used"] == 4


@pytest.mark.parametrize("command", ["train", "train --streaming", "inspect", "evaluate"])
def test_a_split_that_is_not_read_is_named_once(models, tmp_path, capsys, command):
    for split in ("train", "test"):
        (tmp_path / "chats").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "chats" / f"{split}.jsonl", GOOD)
    words = [*command.split(), "--model_path", models("llama"), "--dataset_path", tmp_path / "chats"]
    if command != "inspect":
        words += ["--output_dir", tmp_path / "out"]
    if "train" in command:
        words += ["--max_steps", 1]
    if command == "evaluate":
        words.append("--no_generate")
    assert main(list(map(str, words))) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("note: chats: only its split train is read, not test.") == 1


def test_unusual_but_valid_records_are_accepted_and_counted(models, tmp_path, capsys):
    data = tmp_path / "records.jsonl"
    records = [
        {"instruction": "你是谁", "output": "答\u2028答"},
        {"instruction": "你是谁", "output": "答\u2028答"},
        {"instruction": "Who", "input": None, "output": "Me 🙂", "source": "a"},
        {"instruction": "Long " * 300, "output": "short", "source": "b"},
    ]
    data.write_bytes(codecs.BOM_UTF8 + b"\r\n\n".join(line(record).strip() for record in records))
    assert train(models("llama"), data, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["records_read"], record["records_used"], record["records_refused"]) == (4, 4, [])
    assert (record["records_copied"], record["records_cut"]) == (1, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert 'in 2 records, key "source" is not used by this format.' in said
    assert "Exact copies of earlier records: 1." in said


@pytest.mark.parametrize("name", ["GBK", "missing key", "a line beyond all bounds"])
def test_records_used_plus_refused_equal_records_read(models, tmp_path, name):
    data = tmp_path / "records.jsonl"
    data.write_bytes(CLASSES[name][0] + b"\n" + FILE)
    assert train(models("llama"), data, tmp_path / "out", "--skip_bad") == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["records_used"] + len(record["records_refused"]) == record["records_read"]
    assert len(record["records_refused"]) == 1
