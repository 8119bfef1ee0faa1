"""Tokenizer trial: regexes that backtrack for hours are detected before records are read; published ones pass."""

import json
import shutil
import sys
from functools import partial

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atomtune.cli import main
from atomtune.data.encoding import tokenizer_trial
from atomtune.data.encoding.token_ids import PieceTokenizer
from atomtune.data.encoding.tokenizer_trial import growth_of, tried_tokenizer
from atomtune.errors import BadModel
from atomtune.limits import Tripped, try_in_child_process
from atomtune.model.load import load_tokenizer
from tests.conftest import DIALOGUES, write_jsonl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")

#: From published tokenizers: GPT-2, Llama 3, Qwen 2.5.
_ELISIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GOOD = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_ELISIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    rf"{_ELISIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
]
#: Each stays within the library's own limit at every position, and so takes very long in total.
BAD = ["a*a*b", r"\s*\s*z", r"\w*\w*\d$"]


def with_pattern(folder, pattern: str):
    """The tokenizer of a folder, with this regex added to its pre-tokenizer."""
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.save(str(file))
    return PieceTokenizer(AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def folder(models, tmp_path):
    import shutil

    return shutil.copytree(models("llama"), tmp_path / "base")


@pytest.mark.parametrize("pattern", GOOD)
def test_published_patterns_pass_within_the_limits(folder, pattern):
    assert tried_tokenizer(with_pattern(folder, pattern)) is None


@pytest.mark.parametrize("pattern", BAD[1:])
def test_a_pattern_that_backtracks_for_hours_is_detected(folder, pattern, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "try_in_child_process", partial(try_in_child_process, seconds=1))
    tripped = tried_tokenizer(with_pattern(folder, pattern))
    assert isinstance(tripped, Tripped) and tripped.cause == "time"


@pytest.mark.slow
def test_a_slow_tokenizer_is_reported_by_name_before_records_are_read(folder, tmp_path, capsys):
    with_pattern(folder, BAD[0])
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    assert main(["inspect", str(data), "--model_path", str(folder)]) == 2
    answer = capsys.readouterr().err
    assert f"{folder}: the tokenizer did not finish within 5 seconds on a long run of 'aaaaaaaaaa…'" in answer


def test_the_same_pattern_is_tried_once(folder, monkeypatch):
    tokens = with_pattern(folder, GOOD[0])
    assert tried_tokenizer(tokens) is None
    monkeypatch.setattr(tokenizer_trial, "try_in_child_process", lambda work: pytest.fail("tried again"))
    assert tried_tokenizer(tokens) is None


def test_a_tokenizer_without_patterns_is_not_tried(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "try_in_child_process", lambda work: pytest.fail("tried"))
    body = json.loads((folder / "tokenizer.json").read_text())
    assert '"Regex"' not in json.dumps([body["normalizer"], body["pre_tokenizer"]])
    assert tried_tokenizer(PieceTokenizer(AutoTokenizer.from_pretrained(folder))) is None


@pytest.mark.parametrize(
    "rules", [[normalizers.Replace("a", "aa")] * 40, [normalizers.Prepend("x" * 10**6)]], ids=["doubling", "a book"]
)
def test_normalizers_that_expand_text_enormously_are_refused(models, tmp_path, rules):
    # Regression: without a regex among them nothing was tried, and the first record with that letter never ended.
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence(rules)
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(BadModel, match=r"turn one character into [0-9,]+"):
        load_tokenizer(str(folder))


def test_published_normalizers_do_not_expand_text():
    # Llama 2 and Gemma replace a space with another character, ALBERT two quotes with one.
    backend = Tokenizer(tokenizer_models.BPE())
    rules = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Replace("``", '"')]
    backend.normalizer = normalizers.Sequence([normalizers.Sequence(rules), normalizers.NFC()])
    assert growth_of(PreTrainedTokenizerFast(tokenizer_object=backend)) == 1
