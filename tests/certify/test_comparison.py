"""Laws of the comparison: an answer cut at the limit is the same answer, however an engine writes its end."""

import pytest

from atomtune.certify.comparison import ALLOWED, _text_difference
from atomtune.certify.prompts import CertPrompt
from atomtune.certify.reference import Expected
from atomtune.data.encoding.choose_template import load_template
from atomtune.engines.engine import EngineReply
from atomtune.model.load import load_tokenizer


@pytest.fixture(scope="module")
def template(models):
    return load_template("auto", load_tokenizer(str(models("qwen3")), trust_remote_code=False))


def difference(template, ours: str, ids: list[int], theirs: str):
    prompt = CertPrompt("Chinese", {"messages": []}, (1,), (), "prompt 1")
    choices = [{token: 0.0} for token in (*ids, 0)]  # no step has a tie: each token had no alternative
    expected = Expected(prompt, tuple(ids), [], [], tuple(ids), ours, False, choices)
    return _text_difference(expected, EngineReply(theirs, False, 1), template, ALLOWED["bfloat16"])


def test_a_character_split_at_the_token_limit_is_not_a_difference(template):
    whole = template.tokenizer("灯亮着呢！", add_special_tokens=False).input_ids
    lone_byte = template.tokenizer.convert_tokens_to_ids("ä")  # the byte E4, the first byte of a three-byte character
    ids = [*whole, lone_byte]
    ours = template.tokenizer.decode(ids)
    assert ours.endswith("\ufffd"), "the answer ends inside a character"
    assert difference(template, ours, ids, "灯亮着呢！") is None
    assert difference(template, ours, ids, "灯亮着呢！\ufffd") is None
    assert difference(template, ours, ids, "灯亮着!") is not None
    assert difference(template, ours, ids, "灯亮着呢 and more") is not None
