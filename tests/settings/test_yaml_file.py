"""YAML file: anything other than plain settings is refused with its line, at once and in little memory."""

import time

import pytest

from atomtune.errors import BadSettings
from atomtune.settings.read import read_train

BOTH = ("--dataset_path", "train.jsonl", "--model_path", "base")


@pytest.fixture
def refused(tmp_path):
    """Read a settings file with these contents; returns the message that refuses it."""

    def read(contents: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        began = time.process_time()
        with pytest.raises(BadSettings) as caught:
            read_train([str(path), *BOTH])
        assert time.process_time() - began < 5
        assert len(str(caught.value)) < 2000
        return str(caught.value)

    return read


def laughs(levels: int, name: str = "lora_targets") -> str:
    """Ten aliases of ten aliases of …: one page of YAML that expands to 10**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"{name}: *a{levels - 1}"])


@pytest.mark.parametrize("name", ["lora_targets", "lr_scheduler_kwargs", "seed", "run_name"])
def test_aliases_that_stand_for_very_many_values_are_refused(refused, name):
    assert f"{name}: nested too deeply, or too many values." in refused(laughs(9, name))


@pytest.mark.parametrize("depth", [50, 2000, 200_000])
def test_deep_nesting_is_refused(refused, depth):
    assert "too deeply" in refused("lora_targets: " + "[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("line", "tag"),
    [
        ("run_name: !!timestamp 2024-13-45", "!!timestamp"),
        ("run_name: !!binary x", "!!binary"),
        ("run_name: !!set {a, b}", "!!set"),
        ("lr_scheduler_kwargs: {a: !!python/name:os.system x}", "!!python/name:os.system"),
        ("run_name: !mine x", "!mine"),
    ],
)
def test_tags_are_refused_by_name(refused, line, tag):
    assert refused(f"seed: 1\n{line}\n") == f"run.yaml:2: {line.partition(':')[0]}: the tag {tag} cannot be used here."


@pytest.mark.parametrize("value", ["!!int x", "!!bool maybe", "!!float x", "!!int ''"])
def test_a_value_that_is_not_what_its_tag_says_is_refused(refused, value):
    assert refused(f"lr_scheduler_kwargs: {{a: {value}}}\n").startswith("run.yaml:1: lr_scheduler_kwargs:")
    assert refused(f"seed: {value}\n").startswith("run.yaml:1: seed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: [1\n", "run.yaml:1: not YAML: a [ that is not closed"),
        ("lora_targets: {1\n", "run.yaml:1: not YAML: a { that is not closed"),
        ("seed: 1\n\tlora_rank: 2\n", "run.yaml:2: not YAML: a tab"),
        ("seed: 1\n  lora_rank: 2\n", "run.yaml:2: not YAML: a second `: `"),
        ("template: a: b\n", "run.yaml:1: not YAML: a second `: `"),
        ('output_dir: "runs\n', "run.yaml:1: not YAML: a quotation mark"),
        ('output_dir: "C:\\data"\n', "run.yaml:1: not YAML: a \\ within double quotes"),
        ("output_dir: @home\n", "run.yaml:1: not YAML: a value that begins with @"),
        ("  seed: 1\nlora_rank: 2\n", "run.yaml:2: not YAML: a line that begins further"),
        ("seed: 1\nlora_rank\n", "run.yaml:2: not YAML: a line without `: `"),
        ("? [a, b]\n: 1\n", "run.yaml:1: expected `name: value`."),
        ("lora_targets: &x [*x]\n", "run.yaml:1: lora_targets: nested too deeply"),
        ("<<: {seed: 1}\n", "run.yaml:1: <<: unknown"),
        ("seed: 1\0\n", "not YAML"),
        ("seed: *nowhere\n", "run.yaml:1: not YAML: a value that begins with *"),
        ("%YAML 9.9\n---\nseed: 1\n", "not YAML"),
        ("seed: 1\n---\nseed: 2\n", "not YAML: a line of `---`"),
        ("a" * 2_000_000, "larger than 1 MB"),
    ],
)
def test_an_invalid_settings_file_is_refused_with_the_place_on_one_line(refused, text, said):
    message = refused(text)
    assert said in message and "\n" not in message


def test_a_records_file_passed_as_settings_is_pointed_to_dataset_path(tmp_path):
    """Regression: the message was YAML's own `expected '<document start>', but found '{'`."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"instruction": "Hello", "output": "Hi"}\n' * 2)
    with pytest.raises(BadSettings, match="a file of records: pass it with --dataset_path"):
        read_train([str(path), "--model_path", "base"])


def test_a_folder_is_not_a_settings_file(tmp_path):
    with pytest.raises(BadSettings, match="a folder; expected a YAML file of settings"):
        read_train([str(tmp_path), *BOTH])
