"""What changes the key of a cached file: anything that can change a token, and nothing else."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizer

from atomtune.data import cache_key
from atomtune.data.cache_key import tokenizer_text
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from tests.data.conftest import EncodedAgainError, asked, template_of
from tests.tiny import CHATML, tokenizer_of


def test_the_same_tokenizer_loaded_again_has_the_same_cache_key(data, tmp_path, no_encoding):
    # Catches a key made from an object's identity, or from anything that use changes (padding, truncation, caches).
    template = template_of()
    asked(data, tmp_path / "cache", template=template)
    template.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    no_encoding()
    asked(data, tmp_path / "cache", template=template_of())
    template.tokenizer(["a", "b c"])
    asked(data, tmp_path / "cache", template=template)


def without_merges() -> Template:
    """A tokenizer with the same vocabulary and other merges, which encodes every text differently."""
    template = template_of()
    state = json.loads(template.tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:5]
    template.tokenizer._tokenizer = type(template.tokenizer._tokenizer).from_str(json.dumps(state))
    return load_template("auto", template.tokenizer)


def with_another_control_token() -> Template:
    template = template_of()
    template.tokenizer.add_special_tokens({"additional_special_tokens": ["</s>"]})
    return load_template("auto", template.tokenizer)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"max_tokens": 121}, id="max_tokens"),
        pytest.param({"overlength": "skip"}, id="overlength"),
        pytest.param({"overlength": "error"}, id="overlength error"),
        pytest.param({"template": template_of(source=CHATML.replace("assistant", "model"))}, id="template"),
        pytest.param({"template": template_of("sentencepiece", None)}, id="tokenizer"),
        pytest.param({"template": without_merges()}, id="merges"),
        pytest.param({"template": with_another_control_token()}, id="control token"),
    ],
)
def test_any_setting_that_can_change_a_token_changes_the_cache_key(data, tmp_path, no_encoding, changed):
    asked(data, tmp_path / "cache")
    no_encoding()
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache", **changed)


@pytest.mark.parametrize("which", ["eos_token", "bos_token"])
def test_another_bos_or_eos_token_changes_the_cache_key(data, tmp_path, no_encoding, which):
    # atom writes the tokenizer's own tokens; the template's text and the vocabulary stay the same.
    asked(data, tmp_path / "cache", template=template_of(source=None))
    tokenizer = tokenizer_of("bytes")
    setattr(tokenizer, which, "<|im_start|>")
    no_encoding()
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache", template=load_template("auto", tokenizer))


def test_changed_content_with_the_same_size_and_mtime_changes_the_cache_key(data, tmp_path, no_encoding):
    # Catches keys made from size and modification time.
    before = data.stat()
    asked(data, tmp_path / "cache")
    data.write_bytes(data.read_bytes().replace(b"I keep", b"I kept"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size
    no_encoding()
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache")


def test_a_cached_file_under_another_name_has_origins_with_that_name(data, tmp_path):
    # Otherwise an error in other.jsonl would send the user to train.jsonl.
    asked(data, tmp_path / "cache")
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes())
    examples, ledger, _ = asked(other, tmp_path / "cache")
    named = [*examples["origin"], *ledger.cut_origins, *(refusal.origin for refusal in ledger.records_refused)]
    assert {origin.partition(":")[0] for origin in named} == {"other.jsonl"}


class WordByWord(PreTrainedTokenizer):
    """A tokenizer written in Python, like many in remote code: its rules are not in its vocabulary."""

    def __init__(self, backwards: bool = False, **kwargs):
        self.backwards = backwards
        self.words = {"<unk>": 0, "</s>": 1, **{chr(code): code for code in range(32, 127)}}
        super().__init__(backwards=backwards, eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return 127

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return list(text[::-1] if self.backwards else text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_python_tokenizer_with_another_argument_changes_the_cache_key(data, tmp_path, no_encoding):
    # Same class and vocabulary, another argument: the ids come in another order.
    asked(data, tmp_path / "cache", template=load_template("atom", WordByWord()))
    assert WordByWord(backwards=True)("ab")["input_ids"] == WordByWord()("ba")["input_ids"]
    no_encoding()
    asked(data, tmp_path / "cache", template=load_template("atom", WordByWord()))
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache", template=load_template("atom", WordByWord(backwards=True)))


@pytest.mark.parametrize("library", ["datasets", "jinja2", "tokenizers", "transformers"])
def test_another_version_of_a_library_that_makes_tokens_changes_the_cache_key(
    data, tmp_path, no_encoding, monkeypatch, library
):
    asked(data, tmp_path / "cache")
    no_encoding()
    asked(data, tmp_path / "cache")
    installed = cache_key.version
    monkeypatch.setattr(cache_key, "version", lambda name: "0.0" if name == library else installed(name))
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache")


def test_other_code_of_reading_and_encoding_changes_the_cache_key(data, tmp_path, no_encoding, monkeypatch):
    asked(data, tmp_path / "cache")
    no_encoding()
    monkeypatch.setattr(cache_key, "_code_hash", lambda: "of other code")
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache")


def test_the_code_that_counts_is_that_of_all_folders_with_its_templates(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "cache_key.py"))
    hashes = []
    for file in ("cache_key.py", "formats/detect.py", "templates/atom.jinja", "__pycache__/detect.pyc"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("code")
        hashes.append(cache_key._code_hash.__wrapped__())
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizer
from .rules import ordered


class OwnTokenizer(PreTrainedTokenizer):
    def __init__(self, **kwargs):
        self.words = {"<unk>": 0, "</s>": 1, **{chr(code): code for code in range(32, 127)}}
        super().__init__(**{"eos_token": "</s>", "unk_token": "<unk>", **kwargs})

    @property
    def vocab_size(self):
        return 127

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return ordered(text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()
"""


def own_tokenizer(folder: Path, *, rules: str):
    """A tokenizer of remote code, loaded as a user does; its rules are in a second file."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER)
    (folder / "rules.py").write_text(f"def ordered(text):\n    return {rules}\n")
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_other_code_of_a_remote_code_tokenizer_changes_the_cache_key(data, tmp_path, no_encoding):
    # Same class, vocabulary and arguments, another helper: the ids come in another order.
    forwards = own_tokenizer(tmp_path / "base", rules="list(text)")
    assert type(forwards).__name__ == "OwnTokenizer"
    asked(data, tmp_path / "cache", template=load_template("atom", forwards))
    no_encoding()
    again = own_tokenizer(tmp_path / "base", rules="list(text)")
    asked(data, tmp_path / "cache", template=load_template("atom", again))
    backwards = own_tokenizer(tmp_path / "base", rules="list(text[::-1])")
    assert backwards("ab")["input_ids"] == forwards("ba")["input_ids"]
    with pytest.raises(EncodedAgainError):
        asked(data, tmp_path / "cache", template=load_template("atom", backwards))


def test_the_text_of_a_library_tokenizer_has_no_code():
    # Otherwise a resumed run would be refused after an upgrade that changes no token.
    for kind in ("bytes", "sentencepiece"):
        assert len(json.loads(tokenizer_text(tokenizer_of(kind)))) == 4
    assert len(json.loads(tokenizer_text(WordByWord()))) == 5


def test_a_tokenizer_class_typed_into_a_notebook_has_the_code_of_its_base_class():
    typed = type("Typed", (WordByWord,), {"__module__": "typed_into_a_notebook"})
    assert json.loads(tokenizer_text(typed()))[4] == json.loads(tokenizer_text(WordByWord()))[4]


def test_a_post_processor_that_adds_special_tokens_changes_no_example(data, tmp_path):
    # The post-processor is part of the key, but its BOS must not get into an example, with or without it.
    template = template_of("sentencepiece", None)
    plain, _, _ = asked(data, tmp_path / "cache", template=template)
    bos = ("<s>", template.tokenizer.bos_token_id)
    template.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    adding, _, _ = asked(data, tmp_path / "cache", template=template)
    assert adding["ids"][:] == plain["ids"][:]
