"""Tried: --try uses values as written, and refuses what cannot be compared before model and data are read."""

import pytest

from atomtune.errors import BadSettings
from atomtune.settings.read import read
from atomtune.settings.tried import points_of

RUN = ["--model_path", "base", "--dataset_path", "train.jsonl"]


def tried(*flags: str) -> dict[str, tuple[str, ...]]:
    return dict(read("sweep", [*RUN, *flags]).tried)


def problems(*flags: str) -> str:
    with pytest.raises(BadSettings) as refused:
        read("sweep", [*RUN, *flags])
    return str(refused.value)


def test_values_are_tried_as_they_are_written():
    flags = ("--try", "learning_rate=1e-4,3e-4", "--try", "lora_rank=8,32", "lora_targets=all-linear,q_proj")
    expected = {"learning_rate": ("1e-4", "3e-4"), "lora_rank": ("8", "32"), "lora_targets": ("all-linear", "q_proj")}
    assert tried(*flags) == expected


def test_try_accepts_a_mapping_in_yaml_and_in_python(tmp_path):
    expected = {"lora_rank": ("8", "32"), "lora_dropout": ("0.1",)}
    file = tmp_path / "run.yaml"
    file.write_text("model_path: base\ndataset_path: train.jsonl\ntry:\n  lora_rank: [8, 32]\n  lora_dropout: 0.1\n")
    assert dict(read("sweep", [str(file)]).tried) == expected
    keywords = {"model_path": "base", "dataset_path": "d", "try_": {"lora_rank": [8, 32], "lora_dropout": [0.1]}}
    assert dict(read("sweep", keywords).tried) == expected


def test_names_of_other_tools_are_understood_here_too():
    assert tried("--try", "lr=1e-4,3e-4") == {"learning_rate": ("1e-4", "3e-4")}


def test_an_unknown_name_in_try_is_not_reported_as_a_syntax_error():
    said = problems("--try", "lora_rnk=8,32")
    assert "--lora_rnk: unknown. Did you mean --lora_rank?" in said
    assert "expected NAME=A,B" not in said
    assert "expected NAME=A,B" in problems("--try", "8,32")


def test_two_spellings_of_one_number_are_one_value():
    assert tried("--try", "learning_rate=1e-4,0.0001,1E-4,3e-4") == {"learning_rate": ("1e-4", "3e-4")}
    assert tried("--try", "lora_rank=8,8.0,16") == {"lora_rank": ("8", "16")}
    assert tried("--try", "lora_targets=q_proj,k_proj,q_proj") == {"lora_targets": ("q_proj", "k_proj")}


def test_two_spellings_of_a_switch_are_one_value():
    assert tried("--try", "use_rslora=true,True,yes,1,no,false,0") == {"use_rslora": ("true", "no")}


def test_every_combination_appears_once():
    points = points_of({"a": ("1", "2"), "b": ("x", "y", "z")})
    assert sorted((point["a"], point["b"]) for point in points) == [(a, b) for a in "12" for b in "xyz"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--try", "learning_rat=1,2"), "Did you mean --learning_rate?"),
        (("--try", "lora_rank=8,many"), "lora_rank 'many': expected a whole number, at least 1 and at most 65,536."),
        (("--try", "lora_rank=0"), "--try lora_rank '0': expected a whole number, at least 1 and at most 65,536."),
        (("--try", "lr_scheduler_type=linear,sine"), "--try lr_scheduler_type 'sine': expected one of linear, cosine"),
        (("--try", "1e-4"), "expected NAME=A,B"),
        (("--try", '{"lora_rank": '), "expected NAME=A,B"),
        (("--try", "{" * 5000), "expected NAME=A,B"),
        (("--hub_token", "hf_x"), "the file of every trial would hold it"),
        (("--try", "lora_rank="), "a value is missing"),
        (("--try", "max_seq_length=128,256"), "it changes the records that are compared"),
        (("--try", "seed=1,2"), "it also selects the held-out records"),
        (("--try", "output_dir=a,b"), "the sweep sets it for each trial"),
        (("--try", "model_path=a,b"), "losses of two bases cannot be compared"),
        # Each of these ended in a traceback.
        *((("--try", f"{name}=1,2"), "a setting of the sweep") for name in ("json", "trials", "try", "config")),
        (("--try", "learning_rate=1e-5:1e-3"), "a range needs --trials N"),
        (("--trials", "3", "--try", "learning_rate=1e-3:1e-5"), "the lower number first"),
        (("--eval_size", "0"), "Leave out --eval_size 0."),
        (("--eval_strategy", "no"), "Leave out --eval_strategy no."),
        (("--max_minutes", "5"), "it would stop each trial before its end"),
        (("--try", "learning_rate=1e-4", "--lora_rnak", "8"), "--lora_rnak"),
    ],
)
def test_invalid_sweep_settings_are_refused(flags, words):
    assert words in problems(*flags)


def test_all_problems_are_reported_together_and_only_once():
    text = problems("--try", "lora_rank=0,8", "--try", "learning_rate=-1,1e-4,x", "--lora_alpha", "no")
    assert text.count("--try lora_rank") == 1 and text.count("--try learning_rate") == 2
    assert text.count("--lora_alpha") == 1


def test_too_many_combinations_are_refused_without_enumerating_them():
    hundred = ",".join(map(str, range(1, 101)))
    flags = [word for name in ("lora_rank", "lora_alpha", "weight_decay") for word in ("--try", f"{name}={hundred}")]
    assert "1,000,000 combinations" in problems(*flags)


@pytest.mark.parametrize("off", [("--continue_training", "False"), ("--max_minutes", "0.0")])
def test_settings_that_are_switched_off_do_not_disturb_a_sweep(off):
    # Both were refused: only `false` and `0` counted as off.
    assert tried(*off, "--try", "lora_rank=8,16") == {"lora_rank": ("8", "16")}
