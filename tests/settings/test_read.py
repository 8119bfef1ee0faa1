"""Read: each setting has one name and a known source, and all mistakes are reported at once."""

import dataclasses
import enum
from pathlib import Path

import datasets
import numpy
import pytest
import yaml
from transformers import SchedulerType, TrainingArguments, training_args

from atomtune.errors import BadSettings
from atomtune.settings.command_settings import ChatSettings, EvaluateSettings, MergeSettings
from atomtune.settings.flags import types_of
from atomtune.settings.library import library_settings, library_types
from atomtune.settings.names import RENAMED
from atomtune.settings.read import LIBRARY_DEFAULTS, OWN_GROUPS, read, read_settings, read_train
from atomtune.settings.train_settings import TrainSettings

BOTH = ("--dataset_path", "train.jsonl", "--model_path", "base")


@pytest.fixture
def run_yaml(tmp_path):
    """A function that reads settings from a YAML file with a given text, and from flags after it."""

    def read(text: str, *flags: str) -> TrainSettings:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return read_train([str(path), *BOTH, *flags])

    return read


def problems(*flags: str) -> list[str]:
    with pytest.raises(BadSettings) as caught:
        read_train([*BOTH, *flags])
    return str(caught.value).splitlines()


def yaml_problems(run_yaml, text: str, *flags: str) -> list[str]:
    with pytest.raises(BadSettings) as caught:
        run_yaml(text, *flags)
    return str(caught.value).splitlines()


# --- default < YAML < flag ------------------------------------------------------------------------------------------


def test_flags_override_yaml_and_yaml_overrides_defaults(run_yaml):
    settings = run_yaml("lora_rank: 4\nlora_alpha: 16\nseed: 1\nmax_steps: 5\n", "--lora_rank", "2", "--seed", "3")
    assert (settings.lora.lora_rank, settings.lora.lora_alpha, settings.lora.lora_dropout) == (2, 16.0, 0.1)
    assert (settings.trainer["seed"], settings.trainer["max_steps"]) == (3, 5)


def test_a_repeated_flag_is_reported_and_the_last_value_is_used():
    said: list[str] = []
    settings = read_train([*BOTH, "--lora_rank", "4", "--seed=1", "--lora-rank", "2"], notice=said.append)
    assert settings.lora.lora_rank == 2
    assert said == ["given more than once: --lora_rank. The last one counts."]
    read_train([*BOTH, "--dataset_path", "more.jsonl"], notice=said.append)
    assert len(said) == 1, "a list grows with each"


def test_every_value_says_where_it_came_from(run_yaml):
    told = run_yaml("# mine\nlora_alpha: 16\n\nmax_steps: 5\n", "--lora_rank", "2", "--seed", "3").resolved()
    assert told["lora_dropout"] == {"value": 0.1, "source": "default"}
    assert told["lora_alpha"] == {"value": 16.0, "source": "run.yaml:2"}
    assert told["max_steps"] == {"value": 5, "source": "run.yaml:4"}
    assert told["lora_rank"] == {"value": 2, "source": "--lora_rank"}
    assert told["seed"] == {"value": 3, "source": "--seed"}
    assert told["save_total_limit"] == {"value": 3, "source": "atomtune's default"}


def test_our_trainer_defaults_yield_to_explicit_settings(run_yaml):
    settings = run_yaml("logging_steps: 3\n", "--learning_rate", "5e-5")
    assert settings.trainer == {**LIBRARY_DEFAULTS, "logging_steps": 3, "learning_rate": 5e-5}
    assert settings.origins["logging_steps"] == "run.yaml:1"


def test_the_last_of_two_equal_flags_counts():
    assert read_train([*BOTH, "--lora_rank", "4", "--lora_rank", "5"]).lora.lora_rank == 5


# --- names ----------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_installed_trainer_is_known_and_no_other():
    # The names are read from the library's source text. Catches fields that it writes in a new way.
    assert set(library_types()) == {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def test_every_trainer_default_is_accepted_as_an_explicit_value(run_yaml):
    # Catches types that were read wrongly from the library's source text, for all of its settings.
    said = {}
    for field in dataclasses.fields(TrainingArguments):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        if field.name not in types_of(OWN_GROUPS):
            said[field.name] = default.value if isinstance(default, enum.Enum) else default
    told = run_yaml(yaml.safe_dump(said)).trainer
    assert {name: told[name] for name in said} == said


def test_a_renamed_setting_is_renamed_to_one_that_exists():
    names = library_types().keys() | types_of(OWN_GROUPS).keys()
    for old, advice in RENAMED.items():
        assert old not in names, f"{old} is a setting of the installed library again"
        named = [word.strip(".,") for word in advice.split() if word.startswith("--")]
        assert {name[2:] for name in named} <= names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("warmup_ratio", "--warmup_steps"),
        ("group_by_length", "--train_sampling_strategy group_by_length"),
        ("overwrite_output_dir", "--resume"),
        ("logging_dir", "TENSORBOARD_LOGGING_DIR"),
        ("no_cuda", "--use_cpu"),
        ("check_point", "--checkpoint"),
    ],
)
def test_a_removed_setting_is_reported_with_its_replacement(run_yaml, old, new):
    (flag,) = problems(f"--{old}", "1")
    (line,) = yaml_problems(run_yaml, f"seed: 1\n{old}: 1\n")
    assert flag.startswith(f"--{old}: removed") and new in flag
    assert line.startswith(f"run.yaml:2: {old}: removed") and new.removeprefix("--") in line


def test_a_setting_without_a_value_is_reported_as_it_stands(run_yaml):
    # It said lora_rank 'None', which nobody had written.
    assert yaml_problems(run_yaml, "lora_rank:\n") == [
        "run.yaml:1: lora_rank '': expected a whole number, at least 1 and at most 65,536."
    ]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("learning_rat", "learning_rate"), ("lora-rnak", "lora_rank"), ("max_seq_lenth", "max_seq_length")],
)
def test_an_unknown_setting_gets_the_closest_name_suggested(run_yaml, wrong, near):
    (flag,) = problems(f"--{wrong}", "3")
    (line,) = yaml_problems(run_yaml, f"seed: 1\n{wrong}: 3\n")
    assert f"Did you mean --{near}?" in flag
    assert line.startswith(f"run.yaml:2: {wrong}: unknown") and near in line


def test_an_unknown_setting_without_a_close_match_gets_no_suggestion():
    (said,) = problems("--xyzzy", "3")
    assert said.startswith("--xyzzy: unknown") and "Did you mean" not in said


@pytest.mark.parametrize("short", ["--lora_ra", "--learning", "--per_device_train", "--resume_from"])
def test_abbreviated_setting_names_are_refused(short):
    # Catches argparse's prefix matching: --learning would set learning_rate today and fail with tomorrow's library.
    (said,) = problems(short, "3")
    assert said.startswith(f"{short}: unknown")


def test_a_folder_without_its_flag_gets_the_flag_suggested(tmp_path):
    """Many users type `atomtune chat out` first. Regression: the message said only that a flag is missing."""
    adapter = tmp_path / "my out"
    adapter.mkdir()
    with pytest.raises(BadSettings) as told:
        read("chat", [str(adapter)])
    assert str(told.value).startswith(f"{adapter}: belongs to no setting. Did you mean --adapter_path '{adapter}'?\n")
    with pytest.raises(BadSettings, match=r"^hello: belongs to no setting\.\n"):
        read("chat", ["hello"])


def test_dashes_are_underscores(run_yaml):
    assert read_train([*BOTH, "--lora-rank", "4"]).lora.lora_rank == 4
    assert read_train([*BOTH, "--lora-rank=4", "--run-name", "a-b"]).trainer["run_name"] == "a-b"
    assert run_yaml("lora-rank: 4\n").lora.lora_rank == 4


def test_only_the_name_has_its_dashes_changed():
    assert read_train([*BOTH, "--output-dir=my-runs/a-b"]).trainer["output_dir"] == "my-runs/a-b"


# --- all mistakes at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_missing_model_is_reported_together_with_other_errors(command):
    with pytest.raises(BadSettings) as caught:
        read(command, ["--bogus", "1", "--dataset_path", "train.jsonl"])
    unknown, missing = str(caught.value).splitlines()
    assert unknown.startswith("--bogus: unknown")
    assert missing.startswith("--model_path is missing: the base model")


def test_a_sweep_without_a_model_reports_its_other_errors_too():
    with pytest.raises(BadSettings) as caught:
        read("sweep", ["--bogus", "1", "--lora_rank", "x", "--try", "seed=1,2"])
    told = sorted(str(caught.value).splitlines())
    beginnings = ("--bogus: unknown", "--lora_rank 'x'", "--try seed:", "A sweep needs --model_path and --dataset_path")
    assert all(map(str.startswith, told, beginnings)), told
    assert len(told) == len(beginnings), told


def test_every_problem_comes_in_one_error():
    said = problems(
        "--warmup_ratio", "0.1", "--lora_rnak", "3", "--lora_dropout", "1", "--seed", "x", "--fp16", "--bf16"
    )
    assert len(said) == 5
    for name in ("--warmup_ratio", "--lora_rnak", "--lora_dropout", "--seed", "--fp16 and --bf16"):
        assert sum(line.startswith(name) for line in said) == 1


def test_problems_of_yaml_and_flags_come_together(run_yaml):
    said = yaml_problems(run_yaml, "lora_rank: many\nlearning_rat: 3\n", "--max_seq_length", "2")
    assert sorted(line.partition(":")[0] for line in said) == ["--max_seq_length '2'", "run.yaml", "run.yaml"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("# a comment\n\nlora_rank: zero\n", "run.yaml:3"),
        ("lora_rank: 4\nlearning_rate:\n  fast\n", "run.yaml:2"),
        ("seed: 1\nlora_rank: 0\n", "run.yaml:2"),
        ("lora_rank: 2\noverlength: cut\n", "run.yaml:2"),
    ],
)
def test_a_wrong_value_in_yaml_is_named_by_its_line(run_yaml, text, place):
    (said,) = yaml_problems(run_yaml, text)
    assert said.startswith(place)


@pytest.mark.parametrize(
    ("text", "name"), [("lora_rank: 0\n", "lora_rank"), ("learning_rate: fast\n", "learning_rate")]
)
def test_a_wrong_value_in_yaml_is_named_by_its_setting(run_yaml, text, name):
    # With a line number alone, the user must open the file to learn which setting is meant.
    (said,) = yaml_problems(run_yaml, text)
    assert name in said


def test_a_wrong_value_is_shown_with_what_was_expected():
    (said,) = problems("--overlength", "cut")
    assert said.startswith("--overlength 'cut'")
    for choice in ("shorten", "skip", "error"):
        assert choice in said


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora_rank", "0"),
        ("--lora_dropout", "1"),
        ("--lora_dropout", "-0.1"),
        ("--lora_alpha", "-1"),
        ("--lora_alpha", "1e38"),
        ("--max_seq_length", "7"),
        ("--eval_size", "-1"),
        ("--lora_rank", "2.5"),
        ("--lora_dropout", "nan"),
        ("--num_train_epochs", "1e308"),
        ("--ddp_timeout", "1000000000000000000"),
        ("--max_steps", "9" * 40),
        ("--save_total_limit", "9" * 17),
        ("--weight_decay", "1e40"),
    ],
)
def test_a_value_out_of_its_range_is_refused(flags):
    (said,) = problems(*flags)
    assert said.startswith(f"{flags[0]} '{flags[1]}'")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        # Regression: each ended in a traceback after data and model were loaded, or was silently ignored.
        (("--log_level", "nope"), "expected one of detail, debug"),
        (("--log_level_replica", "5"), "expected one of detail, debug"),
        (("--train_sampling_strategy", "nope"), "expected one of random"),
        (("--ddp_backend", "nope"), "expected one of nccl"),
        (("--parallelism_config", "x"), "which cannot be written as text"),
        (("--debug", "underflow_overflow"), "fused here"),
        (("--early_stopping_patience", "2", "--eval_strategy", "no"), "needs evaluations"),
        (("--save_strategy", "best", "--eval_strategy", "no"), "needs evaluations"),
        (("--lr_scheduler_type", "greedy", "--eval_strategy", "no"), "needs evaluations"),
    ],
)
def test_values_the_trainer_would_crash_on_or_ignore_are_refused(flags, reason):
    (said,) = problems(*flags)
    assert flags[0] in said and reason in said


@pytest.mark.parametrize("number", [".nan", "-.inf"])
def test_nan_and_infinity_inside_a_yaml_mapping_are_refused(run_yaml, number):
    (said,) = yaml_problems(run_yaml, f"lr_scheduler_kwargs: {{a: [{number}]}}\n")
    assert "NaN and infinity are not allowed here" in said


def test_infinity_in_a_json_flag_is_refused():
    (said,) = problems("--lr_scheduler_kwargs", '{"power": 1e400}')
    assert "NaN and infinity" in said


def test_a_key_that_a_mapping_has_twice_is_refused(run_yaml):
    (said,) = yaml_problems(run_yaml, "lr_scheduler_kwargs: {a: 1, a: 2}\n")
    assert "lr_scheduler_kwargs: a is set twice" in said


def test_the_log_level_choices_are_those_of_transformers():
    levels = library_settings()["log_level"].choices
    assert set(levels) == set(training_args.trainer_log_levels)


def test_a_flag_without_its_value_is_named():
    (said,) = problems("--lora_rank")
    assert said.startswith("--lora_rank") and "its value is missing" in said


@pytest.mark.parametrize("extra", [("b.yaml",), ("-x",)])
def test_a_stray_argument_is_reported_together_with_other_problems(run_yaml, extra):
    # Catches argparse's page of usage, which would hide the other problems.
    said = yaml_problems(run_yaml, "seed: 1\n", *extra, "--lora_rnak", "3")
    assert any(extra[0] in line for line in said)
    assert any("--lora_rank" in line for line in said)


# --- YAML -----------------------------------------------------------------------------------------------------------


def test_a_duplicate_key_is_refused_with_both_lines(run_yaml):
    # PyYAML silently takes the last one.
    (said,) = yaml_problems(run_yaml, "seed: 1\nlora_rank: 4\nseed: 2\n")
    assert said.startswith("run.yaml:3") and "seed" in said and "run.yaml:1" in said


def test_a_duplicate_key_in_two_spellings_is_refused(run_yaml):
    (said,) = yaml_problems(run_yaml, "lora_rank: 1\nlora-rank: 4\n")
    assert said.startswith("run.yaml:2")


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4", "'1e-4'"])
def test_a_number_with_an_exponent_is_a_number(run_yaml, written):
    # PyYAML follows YAML 1.1, in which 1e-4 is text.
    rate = run_yaml(f"learning_rate: {written}\n").trainer["learning_rate"]
    assert isinstance(rate, float) and rate == 1e-4


def test_a_number_with_an_exponent_is_a_number_inside_a_mapping_too(run_yaml):
    # As text it would reach the scheduler, hours later.
    assert run_yaml("lr_scheduler_kwargs: {min_lr: 1e-5}\n").trainer["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


@pytest.mark.parametrize("text", ["save_strategy: no\n", "eval_strategy: no\n"])
def test_yaml_no_stays_text_where_text_is_expected(run_yaml, text):
    # In YAML 1.1 it means false. It works as the value of a flag, so it must work here.
    name = text.partition(":")[0]
    assert run_yaml(text).trainer[name] == "no"


@pytest.mark.parametrize("word", ["2024.10", "007", "1e3", "2024-05-01", "2024-13-45", "yes", "a b"])
def test_a_text_in_yaml_is_kept_as_it_is_written(run_yaml, word):
    # As for a flag. If it were read as a number first, output_dir: 2024.10 would become the folder 2024.1.
    assert run_yaml(f"output_dir: {word}\n").trainer["output_dir"] == word
    assert run_yaml(f"eval_path: {word}\n").data.eval_path == word


def test_a_leading_zero_does_not_make_a_number_octal(run_yaml):
    assert run_yaml("seed: 010\n").trainer["seed"] == read_train([*BOTH, "--seed", "010"]).trainer["seed"] == 10


@pytest.mark.parametrize("value", ["true", "yes"])
def test_a_yaml_boolean_is_refused_where_a_number_is_expected(run_yaml, value):
    # `lora_rank: yes` would silently be rank 1; as the value of a flag it is refused.
    (said,) = yaml_problems(run_yaml, f"lora_rank: {value}\n")
    assert said.startswith("run.yaml:1")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("seed: [1\n", id="an open bracket"),
        pytest.param("- seed\n", id="a list"),
        pytest.param("just words\n", id="words"),
        pytest.param("seed: 1\n\tlora_rank: 2\n", id="a tab"),
        pytest.param("run_name: !!python/name:os.system\n", id="a Python object"),
        pytest.param("run_name: !mine x\n", id="an unknown tag"),
    ],
)
def test_an_invalid_yaml_settings_file_is_a_user_error(run_yaml, text):
    assert "run.yaml" in yaml_problems(run_yaml, text)[0]


def test_yaml_in_another_encoding_is_the_users_mistake(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run_name: 甄嬛\n".encode("gbk"))
    with pytest.raises(BadSettings, match=r"run\.yaml.*UTF-8"):
        read_train([str(path), *BOTH])


def test_a_missing_yaml_file_is_named():
    (said,) = problems("nowhere.yaml")
    assert said.startswith("nowhere.yaml: no such file")


@pytest.mark.parametrize("content", [None, b"seed: [1\n", b"- seed\n", b"\xff\n"])
def test_a_yaml_file_that_cannot_be_read_hides_no_other_problem(tmp_path, content):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    said = "\n".join(problems(str(tmp_path / "run.yaml"), "--lora_rnak", "3", "--max_seq_length", "2"))
    assert all(part in said for part in ("run.yaml", "--lora_rank", "--max_seq_length '2'"))


def test_settings_of_other_tools_without_a_value_are_left_out(run_yaml):
    # Axolotl's files are full of them, and the list of refusals hid the real problems.
    settings = run_yaml("wandb_project:\nlora_target_modules:\nspecial_tokens: ~\nval_set_size: null\nseed: 7\n")
    assert settings.lora.lora_targets == ["all-linear"] and settings.data.eval_size is None
    assert settings.trainer["seed"] == 7


def test_a_misspelled_setting_without_a_value_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_rnak:\n")
    assert any("lora_rank" in said for said in problems(str(tmp_path / "run.yaml")))


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeffseed: 7\n"])
def test_an_empty_yaml_file_and_a_byte_order_mark_are_accepted(run_yaml, text):
    assert run_yaml(text).trainer.get("seed") == (7 if "seed" in text else None)


# --- forms of a value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (("--fp16",), True),
        (("--fp16", "true"), True),
        (("--fp16", "True"), True),
        (("--fp16=true",), True),
        (("--fp16", "false"), False),
        (("--fp16", "--seed", "1"), True),
    ],
)
def test_a_boolean_flag_works_with_and_without_a_value(flags, value):
    assert read_train([*BOTH, *flags]).trainer["fp16"] is value


def test_a_list_may_be_given_in_one_flag_or_in_several():
    expected = ["a=user", "b=assistant"]
    for words in (
        ["--roles", *expected],
        ["--roles", ",".join(expected)],
        ["--roles", "a=user", "--roles", "b=assistant"],
    ):
        assert read_train([*BOTH, *words]).data.roles == expected


def test_the_last_equals_sign_of_a_pair_separates_their_name_from_ours():
    settings = read_train(
        [*BOTH, "--keys", "a=b=output", "question=input", "--roles", "a=b=user", "--max_seq_length", "9"]
    )
    assert settings.data.rules()["keys"] == (("a=b", "output"), ("question", "input"))
    assert settings.data.rules()["roles"] == (("a=b", "user"),)


@pytest.mark.parametrize("words", [["city, state=input", "a,b=output"], ["city, state=input,a,b=output"]], ids=len)
def test_a_key_with_a_comma_is_one_key(words):
    # Each part was taken for a pair of its own, so such a column could not be named.
    settings = read_train([*BOTH, "--keys", *words, "--max_seq_length", "9"])
    assert settings.data.rules()["keys"] == (("city, state", "input"), ("a,b", "output"))


def test_a_pair_without_our_name_is_refused_beside_a_whole_one():
    with pytest.raises(BadSettings, match="--keys 'output': expected THEIRS=OURS"):
        read_train([*BOTH, "--keys", "question=input,output"])


def test_the_word_false_is_parsed_as_false():
    # Catches bool("false"), which is True.
    assert read_train([*BOTH, "--remove_unused_columns", "false"]).trainer["remove_unused_columns"] is False


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("full_shard", "full_shard")])
def test_a_boolean_or_text_setting_accepts_both(word, value):
    # FSDP takes words ("full_shard") in older versions of the library, and is a boolean in newer ones.
    assert read_train([*BOTH, "--fsdp", word]).trainer["fsdp"] in (value, [value])


@pytest.mark.parametrize(("flags", "value"), [((), False), (("--skip_bad",), True), (("--skip_bad", "false"), False)])
def test_our_own_boolean_flags_accept_the_same_forms(flags, value):
    assert read_train([*BOTH, *flags]).data.skip_bad is value


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ((), "auto"),
        (("--gradient_checkpointing",), "true"),
        (("--gradient_checkpointing", "False"), "false"),
        (("--gradient_checkpointing", "auto"), "auto"),
    ],
)
def test_gradient_checkpointing_accepts_a_boolean_or_auto(flags, value):
    assert read_train([*BOTH, *flags]).run.gradient_checkpointing == value


def test_gradient_checkpointing_in_yaml_accepts_a_boolean_or_auto(run_yaml):
    assert run_yaml("gradient_checkpointing: true\n").run.gradient_checkpointing == "true"
    assert run_yaml("gradient_checkpointing: auto\n").run.gradient_checkpointing == "auto"


@pytest.mark.parametrize("flags", [("q_proj", "v_proj"), ("q_proj,v_proj",), ("q_proj,", "v_proj")])
def test_a_list_may_be_words_or_words_with_commas(flags):
    assert read_train([*BOTH, "--lora_targets", *flags]).lora.lora_targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize("text", ["[q_proj, v_proj]", "q_proj,v_proj", "\n- q_proj\n- v_proj"])
def test_a_list_in_yaml_may_be_a_list_or_words_with_commas(run_yaml, text):
    assert run_yaml(f"lora_targets: {text}\n").lora.lora_targets == ["q_proj", "v_proj"]


def test_a_folder_with_a_comma_in_its_name_is_one_folder(tmp_path):
    # Regression: --adapter_path out,lr=1e-4, which our own next commands print, became two folders.
    folder = tmp_path / "out,lr=1e-4"
    folder.mkdir()
    for words, folders in (([str(folder), "b"], [str(folder), "b"]), (["a,b"], ["a", "b"])):
        settings = read_settings(EvaluateSettings, ["--adapter_path", *words], command="evaluate")
        assert settings.adapter_path == folders


def test_one_word_is_a_list_of_one(run_yaml):
    assert read_train([*BOTH, "--lora_targets", "q_proj"]).lora.lora_targets == ["q_proj"]
    assert run_yaml("lora_targets: q_proj\n").lora.lora_targets == ["q_proj"]


@pytest.mark.parametrize(
    ("flags", "value"), [(("none",), "none"), (("tensorboard", "wandb"), ["tensorboard", "wandb"])]
)
def test_a_list_of_the_trainer_may_be_one_word_or_several(flags, value):
    assert read_train([*BOTH, "--report_to", *flags]).trainer["report_to"] == value


def test_one_word_is_a_list_of_one_for_the_trainer_too(run_yaml):
    assert read_train([*BOTH, "--include_for_metrics", "loss"]).trainer["include_for_metrics"] == ["loss"]
    assert run_yaml("label_names: labels\n").trainer["label_names"] == ["labels"]


def test_a_mapping_after_a_flag_is_parsed_as_json():
    settings = read_train([*BOTH, "--lr_scheduler_kwargs", '{"min_lr": 1e-5, "num_cycles": 2}'])
    assert settings.trainer["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "num_cycles": 2}
    assert problems("--lr_scheduler_kwargs", "{min_lr")[0].startswith("--lr_scheduler_kwargs '{min_lr': not JSON")


def test_a_path_of_digits_is_a_path(run_yaml):
    assert run_yaml("output_dir: 2024\neval_path: 7\n").data.eval_path == "7"
    assert run_yaml("output_dir: 2024\n").trainer["output_dir"] == "2024"


# --- contradictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--skip_overlength", "--overlength", "shorten"), ("--skip_overlength", "--overlength shorten")),
        (("--continue_training",), ("--continue_training", "--checkpoint")),
        (("--checkpoint", "c"), ("--checkpoint", "--continue_training")),
        (("--resume", "--resume_from_checkpoint", "c"), ("--resume", "--resume_from_checkpoint")),
        (("--resume", "--continue_training", "--checkpoint", "c"), ("--resume", "--continue_training")),
        (("--eval_path", "e", "--eval_size", "0.1"), ("--eval_path", "--eval_size")),
        (("--fp16", "--bf16"), ("--fp16", "--bf16")),
        (("--use_dora", "--lora_experts"), ("--use_dora", "--lora_experts")),
        (
            ("--streaming", "--max_steps", "9", "--train_sampling_strategy", "group_by_length"),
            ("--streaming", "--train_sampling_strategy"),
        ),
    ],
)
def test_a_contradiction_names_both_sides(flags, names):
    (said,) = problems(*flags)
    assert all(name in said for name in names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", "0"), "--max_steps 0 trains nothing."),
        (("--eval_size", "1.5"), "--eval_size 1.5: expected a share below 1, or a whole number of records."),
        (("--resume", "run.yaml"), "A file of settings stands before the flags: run.yaml --resume."),
        (("--streaming",), "--streaming needs --max_steps:"),
        (("--streaming", "--max_steps", "9", "--dataloader_num_workers", "2"), "every worker would read all the files"),
        # Beside an invalid setting, max_steps was taken for missing.
        (("--streaming", "--max_steps", "9", "--seed", "-1"), "--seed '-1': expected a whole number"),
    ],
)
def test_each_problem_is_the_only_one_reported(flags, message):
    (said,) = problems(*flags)
    assert message in said


@pytest.mark.parametrize(
    "flags",
    [
        ("--skip_overlength", "--overlength", "skip"),
        ("--skip_overlength", "false", "--overlength", "error"),
        ("--continue_training", "--checkpoint", "c"),
        ("--resume", "false", "--resume_from_checkpoint", "c"),
        ("--eval_path", "e", "--eval_size", "0"),
        ("--eval_path", "e", "--eval_size", "0.0"),
        ("--streaming", "--max_steps", "9", "--train_sampling_strategy", "random"),
        *(("--fp16", no, "--bf16", "true") for no in ("false", "False", "0", "no", "off", "n", "f")),
    ],
)
def test_disabled_settings_cause_no_contradiction(flags):
    # Every word that pydantic reads as false.
    read_train([*BOTH, *flags])


@pytest.mark.parametrize(("given", "missing"), [("model_path", "dataset_path"), ("dataset_path", "model_path")])
def test_a_model_or_a_dataset_alone_is_refused_naming_the_other(given, missing):
    with pytest.raises(BadSettings) as caught:
        read_train([f"--{given}", "x"])
    assert f"--{given} is given without --{missing}" in str(caught.value)


def test_without_model_and_data_the_demo_is_run():
    assert read_train([]).demo
    assert not read_train(BOTH).demo


# --- the tutorial's command, and the other commands -----------------------------------------------------------------


def test_the_tutorials_command_is_read_as_it_stands():
    command = """
        --dataset_path ../../dataset/huanhuan.jsonl --model_path model/Atom --lora_rank 8
        --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --max_steps 120000 --save_steps 40000
        --save_total_limit 3 --learning_rate 1e-4 --fp16 --remove_unused_columns false --logging_steps 10
        --output_dir ../../output
    """
    settings = read_train(command.split())
    assert (settings.data.dataset_path, settings.model.model_path) == ("../../dataset/huanhuan.jsonl", "model/Atom")
    assert settings.trainer["max_steps"] == 120_000 and settings.trainer["fp16"] is True


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_example_files_are_read(path):
    read_train([str(path), *BOTH])


def test_a_command_with_one_group_reads_its_flags():
    settings = read_settings(ChatSettings, ["--adapter-path", "out", "--temperature", "0.5"], command="chat")
    assert (settings.adapter_path, settings.temperature, settings.max_new_tokens) == ("out", 0.5, 512)


def test_what_a_command_needs_is_named_when_missing():
    with pytest.raises(BadSettings) as caught:
        read_settings(MergeSettings, ["--dtype", "float8"], command="merge")
    said = str(caught.value)
    assert all(name in said for name in ("--adapter_path", "--output_dir", "--dtype 'float8'"))


def test_a_command_refuses_the_settings_of_another():
    with pytest.raises(BadSettings, match="--learning_rate: unknown"):
        read_settings(
            MergeSettings, ["--adapter_path", "a", "--output_dir", "b", "--learning_rate", "1"], command="merge"
        )


@pytest.mark.parametrize("written", ['"a\\0b"', '"a\\ud800b"'])
@pytest.mark.parametrize("name", ["output_dir", "template", "run_name"])
def test_text_that_cannot_be_a_file_name_is_refused_with_its_line(run_yaml, name, written):
    # YAML can express it; the system call would raise a ValueError about null bytes.
    (said,) = yaml_problems(run_yaml, f"{name}: {written}\n")
    assert said.startswith(f"run.yaml:1: {name}") and "it contains a NUL or an incomplete character" in said


@pytest.mark.parametrize("name", ["dataset_path", "model_path", "eval_path", "output_dir", "resume_from_checkpoint"])
def test_an_empty_file_name_is_refused(name):
    # What a shell makes of a variable that is not set. It meant the working directory, or no checkpoint at all.
    (problem,) = problems(f"--{name}", "")
    assert problem.startswith(f"--{name} '") and "an empty one would mean the working directory" in problem


@pytest.mark.parametrize(
    "records", [[{"instruction": "x", "output": "y"}], datasets.Dataset.from_list([{"text": "x"}])]
)
def test_records_in_memory_are_refused_without_their_texts(records):
    with pytest.raises(BadSettings) as caught:
        read_train({"model_path": "base", "dataset_path": records})
    assert str(caught.value) == (
        f"train(): dataset_path: its value is of the type {'dict' if isinstance(records, list) else 'Dataset'}; "
        "expected a text, a number, or a list of these. Write the records to a file first, and pass its name."
    )


def test_values_of_python_are_read_like_words():
    keywords = {"dataset_path": [Path("a.jsonl")], "model_path": Path("base"), "lora_targets": {"v_proj", "q_proj"}}
    keywords |= {"learning_rate": numpy.float32(0.5), "lr_scheduler_type": SchedulerType.COSINE, "skip_bad": True}
    settings = read_train(keywords)
    assert settings.data.dataset_paths == ["a.jsonl"] and settings.data.skip_bad
    assert settings.lora.lora_targets == ["q_proj", "v_proj"]
    assert settings.trainer["learning_rate"] == 0.5 and settings.trainer["lr_scheduler_type"] == "cosine"


def test_a_file_of_settings_has_a_path():
    with pytest.raises(BadSettings, match=r"train\(\): config is a dict; expected the path of a YAML file"):
        read_train({"config": {"lora_rank": 4}})


def test_a_data_path_that_is_not_utf_8_is_accepted():
    assert read_train([*BOTH, "--eval_path", "caf\udce9.jsonl"]).data.eval_path == "caf\udce9.jsonl"


@pytest.mark.parametrize("name", ["model_path", "output_dir", "resume_from_checkpoint"])
def test_a_model_folder_that_is_not_utf_8_is_refused(name):
    # Regression: safetensors and tokenizers, in Rust, ended a run at its first save, and a merge in a traceback.
    (said,) = problems(f"--{name}", "caf\udce9")
    assert said.startswith(f"--{name} 'caf\\udce9': ") and said.endswith("not in UTF-8 here. Rename it.")


def test_a_non_ascii_model_folder_in_a_non_utf_8_locale_is_refused(monkeypatch):
    monkeypatch.setattr("os.fsencode", lambda name: name.encode("gb18030"))
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "gb18030")
    with pytest.raises(BadSettings, match=r"--adapter_path '灯': .*Set PYTHONUTF8=1"):
        read("chat", ["--adapter_path", "灯"])
    assert read("chat", ["--adapter_path", "lamp"]).adapter_path == "lamp"


def test_a_prompt_that_is_not_utf_8_is_refused():
    with pytest.raises(BadSettings, match="an incomplete character"):
        read("chat", ["--adapter_path", "caf\udce9", "--prompt", "caf\udce9"])


@pytest.mark.parametrize("value", ["{", '{"power": NaN}', '{"power": ' + "9" * 5000 + "}", "{" * 5000])
def test_json_that_cannot_be_read_is_one_problem(value):
    (said,) = problems("--lr_scheduler_kwargs", value)
    assert "not JSON" in said


@pytest.mark.parametrize("command", ["train", "inspect", "verify", "evaluate"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "expected a JSON object"),
        ('{"enable_thinking": "false"}', "true or false, without quotes"),  # a template treats a text as true
    ],
)
def test_chat_template_kwargs_are_validated_before_anything_is_loaded(command, value, words):
    run = ("--adapter_path", "out") if command == "evaluate" else BOTH
    with pytest.raises(BadSettings, match=words):
        read(command, [*run, "--chat_template_kwargs", value])


@pytest.mark.parametrize("tokens", ["1", "7"])
def test_a_max_seq_length_below_8_is_refused_except_0(tokens):
    with pytest.raises(BadSettings, match="at least 8"):
        read("evaluate", ["--adapter_path", "out", "--max_seq_length", tokens])
    read("evaluate", ["--adapter_path", "out", "--max_seq_length", "0"])
