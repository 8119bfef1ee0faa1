"""Variables and the date of a template: training renders what a server renders with the same values.

The oracle is transformers' own apply_chat_template. A run saves the values with the adapter and for a resume.
"""

import itertools
import json
import shutil
from datetime import date, datetime
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.omissions import NOT_WRITTEN
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.model.adapter_folder import template_of
from atomtune.model.generate import prompt_ids
from tests.conftest import DIALOGUES, write_jsonl
from tests.reading import encode
from tests.tiny import CHATML, tokenizer_of

TWO_MODES = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}",
)
READS_DOCUMENTS = "{% for d in documents or [] %}[{{ d['title'] }}]{% endfor %}" + CHATML
NAMES_THE_DAY = "{{ strftime_now('%d %B %Y') }}" + CHATML
QUESTION = {"role": "user", "content": "Who are you?"}
TALK = {"messages": [QUESTION, {"role": "assistant", "content": "I keep the light."}]}


def prompt_of(record: dict, source: str, **options) -> list[int]:
    """The ids before the answer of a record with one exchange."""
    template = load_template("auto", tokenizer_of("bytes", source), **options)
    ledger = Ledger()
    raw = RawRecord(record, "train.jsonl:1")
    examples = list(itertools.chain(*encode([raw], template, ledger, max_tokens=1000, schema=Schema("messages"))))
    assert len(examples) == 1, ledger.records_refused
    return [id_ for id_, times in zip(examples[0].ids, examples[0].learn, strict=True) if not times]


def served(source: str, **variables) -> list[int]:
    tokenizer = tokenizer_of("bytes", source)
    text = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True, **variables)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
def test_template_variables_of_the_run_apply_to_every_prompt(variables):
    assert prompt_of(TALK, TWO_MODES, variables=variables) == served(TWO_MODES, **variables)


@pytest.mark.parametrize(
    "record_sets",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": '{"enable_thinking": false}'},  # as in a CSV or Parquet file
        {"enable_thinking": False},
    ],
    ids=["object", "text", "key"],
)
def test_template_variables_of_a_record_override_those_of_the_run(record_sets):
    ours = prompt_of({**TALK, **record_sets}, TWO_MODES, variables={"enable_thinking": True})
    assert ours == served(TWO_MODES, enable_thinking=False)
    assert ours != served(TWO_MODES, enable_thinking=True)


def test_documents_of_a_record_are_rendered_in_the_prompt():
    documents = [{"title": "Tides", "text": "Twice a day."}]
    assert prompt_of({**TALK, "documents": documents}, READS_DOCUMENTS) == served(READS_DOCUMENTS, documents=documents)


def test_documents_the_template_ignores_are_reported_and_other_variables_apply():
    # A server that gets them writes the same prompt. Refusing the record also lost its enable_thinking.
    sets = {"enable_thinking": False, "documents": [{"title": "Tides", "text": "Twice a day."}]}
    assert prompt_of({**TALK, **sets}, TWO_MODES) == served(TWO_MODES, **sets)
    assert served(TWO_MODES, **sets) == served(TWO_MODES, enable_thinking=False)
    for source, notices in ((TWO_MODES, {NOT_WRITTEN["documents"]: 1}), (READS_DOCUMENTS, {})):
        ledger = Ledger()
        template = load_template("auto", tokenizer_of("bytes", source))
        raw = RawRecord({**TALK, **sets}, "train.jsonl:1")
        assert encode([raw], template, ledger, max_tokens=1000, schema=Schema("messages"))
        assert dict(ledger.notices) == notices


def test_a_control_token_string_in_a_variable_stays_text():
    # Text of a record never becomes a control token, wherever it is stored.
    documents = [{"title": "<|im_end|>"}]
    ours = prompt_of({**TALK, "documents": documents}, READS_DOCUMENTS)
    end = tokenizer_of("bytes", CHATML).convert_tokens_to_ids("<|im_end|>")
    assert ours.count(end) == prompt_of(TALK, READS_DOCUMENTS).count(end)


def test_template_variables_that_are_not_an_object_are_refused():
    ledger = Ledger()
    template = load_template("auto", tokenizer_of("bytes", TWO_MODES))
    raw = RawRecord({**TALK, "chat_template_kwargs": [1]}, "train.jsonl:1")
    assert not encode([raw], template, ledger, max_tokens=1000, schema=Schema("messages"))
    assert "chat_template_kwargs is a list; expected an object" in ledger.records_refused[0].reason


def test_the_template_renders_the_given_date():
    day = date(2031, 1, 31)
    tokenizer = tokenizer_of("bytes", NAMES_THE_DAY)
    begins = tokenizer(datetime(2031, 1, 31).strftime("%d %B %Y"), add_special_tokens=False)["input_ids"]
    assert prompt_of(TALK, NAMES_THE_DAY, day=day)[: len(begins)] == begins


def test_variables_and_the_day_are_part_of_the_cache_key(tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [TALK])
    rules = Rules(max_tokens=1000)

    def ids(source: str, **options) -> list[list[int]]:
        template = load_template("auto", tokenizer_of("bytes", source), **options)
        return examples_of(data, template, rules, cache_dir=tmp_path / "cache").examples["ids"][:]

    def entries() -> int:
        return len(list((tmp_path / "cache" / "atomtune").iterdir()))

    assert ids(TWO_MODES) != ids(TWO_MODES, variables={"enable_thinking": False})
    assert ids(NAMES_THE_DAY, day=date(2031, 1, 31)) != ids(NAMES_THE_DAY, day=date(2031, 2, 1))
    before = entries()
    # A template without a date is encoded once for all days.
    ids(TWO_MODES, day=date(2031, 2, 1))
    assert entries() == before == 4
    assert json.dumps(ids(TWO_MODES)) == json.dumps(ids(TWO_MODES, day=date(2031, 2, 1)))


# --- a run --------------------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %B %Y') }}{{ '[calm]' if calm else '' }}" + CHATML


@pytest.fixture(scope="module")
def base(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dated") / "base"
    shutil.copytree(models("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def train_on(base: Path, folder: Path, *more: str) -> int:
    data = write_jsonl(folder / "dialogues.jsonl", DIALOGUES)
    return main(
        [
            *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(folder / "out")),
            *("--dtype", "float32", "--save_steps", "1", "--per_device_train_batch_size", "4", *more),
        ]
    )


def rendered(out: Path) -> str:
    template, _ = template_of(out, trust_remote_code=False)
    return template.tokenizer.decode(prompt_ids(template, [{"role": "user", "content": "Hi"}]))


@pytest.mark.slow
def test_an_adapter_and_a_resumed_run_keep_the_variables_and_the_date(base, tmp_path, capsys):
    calm = ("--chat_template_kwargs", '{"calm": true}')
    assert train_on(base, tmp_path, *calm, "--template_date", "2031-01-31", "--max_steps", "1") == 0
    out = tmp_path / "out"
    assert rendered(out).startswith("31 January 2031[calm]")

    # A resume on another day is the same run, although nobody passes the date …
    assert train_on(base, tmp_path, *calm, "--max_steps", "2", "--resume") == 0
    assert rendered(out).startswith("31 January 2031[calm]")
    assert date.today() != date(2031, 1, 31)
    # … but with other variables it is another run.
    assert train_on(base, tmp_path, "--max_steps", "3", "--resume") == 2
    assert "chat_template_kwargs" in capsys.readouterr().err
    assert train_on(base, tmp_path, *calm, "--template_date", "2031-02-01", "--max_steps", "3", "--resume") == 2
    assert "template_date" in capsys.readouterr().err


def test_a_run_without_a_template_date_saves_the_day_it_started(base, tmp_path):
    assert train_on(base, tmp_path, "--max_steps", "1") == 0
    metadata = json.loads((tmp_path / "out" / "atomtune.json").read_text())
    assert metadata["template_date"] == date.today().isoformat()


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--chat_template_kwargs", "[1]", "expected a JSON object"),
        ("--chat_template_kwargs", "{enable", "expected a JSON object"),
        ("--template_date", "31.1.2031", "expected a date, for example 2026-01-31"),
    ],
)
def test_invalid_variables_and_dates_are_refused_before_anything_is_read(flag, value, says, tmp_path, capsys):
    assert train_on(tmp_path / "no base", tmp_path, flag, value) == 2
    assert says in capsys.readouterr().err
