"""The page is one file, loads nothing and shows text as text; checked in a real browser if one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.inspect import html_page as page_module
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import tokenizer_of

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><!--"
RECORDS = [
    *DIALOGUES,
    DIALOGUES[0],
    {"instruction": f"Say {EVIL}", "input": "", "output": f"{EVIL} </s> & <b>bold</b>"},
    {"instruction": "no answer", EVIL: 1},
    {"instruction": "龘", "input": "", "output": "🦄 lives"},  # characters that are no tokens of their own: bytes
    *({"instruction": f"Which number is {n}?", "input": "", "output": f"It is {n} of them all."} for n in range(60)),
]


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium is installed: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    tokenizer_of("sentencepiece").save_pretrained(folder / "base")
    data = write_jsonl(folder / "a&b<i>.jsonl", RECORDS)
    file = folder / "new" / "report.html"
    assert main(["inspect", str(data), "--model_path", str(folder / "base"), "--html", str(file)]) == 0
    return file


@pytest.fixture
def dom(report, tmp_path):
    """`dom("problem=cut")` is the page's document after its script ran, opened with #problem=cut in its address."""

    def opened(place: str = "") -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
        address = f"{report.as_uri()}#{place}"
        run = subprocess.run(
            [browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}", address],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return run.stdout

    return opened


def records_in(dom: str) -> list[str]:
    """The text of each record that is shown, without tags."""
    cards = re.findall(r'<article class="record.*?</article>', dom, flags=re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", card)) for card in cards]


def told_in(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1))


def test_the_page_loads_no_external_resources(report):
    text = report.read_text(encoding="utf-8")
    without_data = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:""", without_data)
    assert "default-src 'none'" in text


def test_a_record_text_with_a_script_end_tag_is_escaped(report):
    text = report.read_text(encoding="utf-8")
    assert text.count("</script>") == 2  # one for the data, one for the page's own script
    assert EVIL not in text
    assert "<i>" not in re.sub(r"<i>(token|词元)</i>", "", text)  # in the file's name
    told = told_in(text)
    letters = [
        "".join(told["pieces"][str(number)][0] for e in one["examples"] for number in e["ids"])
        for one in told["records"]
    ]
    assert any(EVIL.replace(" ", "·") in one for one in letters)


def test_the_page_data_has_the_examples_token_ids_and_learned_runs(report):
    told = told_in(report.read_text(encoding="utf-8"))
    for record in told["records"]:
        for example in record["examples"]:
            assert sum(count for count, _ in example["runs"]) == len(example["ids"])
            assert example["runs"][0][1] == 0
            assert example["runs"][-1][1] == 1
            assert example["ids"][-1] == 2


def test_all_records_are_listed_with_problem_records_first(report):
    told = told_in(report.read_text(encoding="utf-8"))
    assert len(told["records"]) == len(RECORDS) - 1
    assert [bool(one["problems"]) for one in told["records"]] == sorted(
        (bool(one["problems"]) for one in told["records"]), reverse=True
    )
    copies = [told["records"][i] for i in told["problems"]["duplicates"]]
    assert [one["origin"] for one in copies] == ["a&b<i>.jsonl:1", "a&b<i>.jsonl:9"]
    assert [one["problems"]["duplicates"] for one in copies] == ["", "a&b<i>.jsonl:1"]


def test_a_large_dataset_is_shown_in_part_with_a_notice(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_RECORDS", 20)
    tokenizer_of("sentencepiece").save_pretrained(tmp_path)
    data = write_jsonl(tmp_path / "data.reading.jsonl", RECORDS)
    assert main(["inspect", str(data), "--model_path", str(tmp_path), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    told = told_in(text)
    assert len(told["records"]) == 20
    assert len(told["problems"]["duplicates"]) == 2
    assert "20 of 71 used records" in text
    monkeypatch.setattr(page_module, "MOST_TOKENS", 1)  # a record longer than that is shown if it is the first
    assert main(["inspect", str(data), "--model_path", str(tmp_path), "--html", str(tmp_path / "one.html")]) == 0
    assert len(told_in((tmp_path / "one.html").read_text(encoding="utf-8"))["records"]) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".r.html")]  # no temporary file is left


def test_rewriting_the_page_does_not_disturb_a_reader_of_the_old_one(tmp_path):
    tokenizer_of("sentencepiece").save_pretrained(tmp_path)
    data, file = write_jsonl(tmp_path / "data.reading.jsonl", DIALOGUES), tmp_path / "r.html"
    file.write_text("the old page")
    with file.open() as reader:
        assert main(["inspect", str(data), "--model_path", str(tmp_path), "--html", str(file)]) == 0
        assert reader.read() == "the old page"
    assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_in_a_browser_record_text_is_not_interpreted_as_html(dom):
    shown = dom("problem=control&lang=en")
    assert "taken" not in re.search(r"<title>(.*?)</title>", shown).group(1)
    (record,) = records_in(shown)
    assert EVIL.replace(" ", "·") in record
    assert "<img" not in re.sub(r'<script type="application/json".*?</script>', "", shown, flags=re.DOTALL)


def test_in_a_browser_a_check_shows_what_it_found(dom):
    shown = records_in(dom("problem=duplicates&lang=en"))
    assert len(shown) == 2
    assert all("我是灯塔的看守人。" in one for one in shown)
    assert "like a&b<i>.jsonl:1" in shown[1]
    (refused,) = records_in(dom("problem=refused"))
    assert "a&b<i>.jsonl:11" in refused
    assert 'no key "output"' in refused


def test_in_a_browser_the_search_finds_a_text_across_its_tokens(dom):
    assert len(records_in(dom("q=WHICH%20NUMBER%20IS%207%3F"))) == 1
    assert records_in(dom("q=nowhere")) == []
    (split,) = records_in(dom("q=%F0%9F%A6%84%20LIVES"))
    assert "⟨F0⟩⟨9F⟩⟨A6⟩⟨84⟩" in split
    assert len(records_in(dom("q=duplicates"))) == 0  # names of checks are not part of the records' text


def test_in_a_browser_learned_tokens_are_marked_with_their_ids(dom):
    shown = dom("q=Which%20number%20is%207%3F&lang=en")
    spans = re.findall(r'<span class="([^"]*)" title="id (\d+) · ([^"]*)">', shown)
    assert spans
    assert all(("l" in name.split()) == (said == "learned") for name, _, said in spans)
    assert spans[-1] == ("l c", "2", "learned")
    assert spans[0] == (" c", "1", "read only")


def test_in_a_browser_long_lists_are_paged_and_language_and_theme_apply(dom):
    shown = dom("lang=zh&theme=dark")
    assert len(records_in(shown)) == 40  # of 71; the button shows the rest
    assert re.search(r'<html[^>]*lang="zh"', shown)
    assert 'data-theme="dark"' in shown
    assert not re.search(r'<button id="more"[^>]*hidden', shown)
