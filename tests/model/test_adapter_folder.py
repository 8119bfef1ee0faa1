"""Adapter folders of other tools are read as their users expect; missing parts are reported and never guessed."""

import json
import shlex
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atomtune.cli import main
from atomtune.engines.served_folder import ServedFolder
from atomtune.errors import BadModel
from atomtune.model.adapter_folder import template_of
from tests.conftest import DIALOGUES, write_jsonl

#: The files of PEFT's save_pretrained that are read again.
OF_PEFT = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def of_peft(models, tmp_path_factory):
    """`of_peft("qwen3")` is the folder of an adapter on that tiny model, saved by PEFT."""

    def folder(family):
        base = AutoModelForCausalLM.from_pretrained(models(family))
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        place = tmp_path_factory.mktemp("peft") / family
        model.save_pretrained(place)
        return place

    return folder


def test_a_peft_adapter_uses_its_bases_tokenizer_and_template(models, of_peft):
    folder, notices = of_peft("qwen3"), []
    template, _ = template_of(folder, trust_remote_code=False, notice=notices.append)
    assert template.source == template.tokenizer.chat_template and template.stop == "<|im_end|>"
    assert notices == [
        f"{folder} holds no tokenizer, so the tokenizer and the chat template of its base {models('qwen3')} are used."
    ]
    # --model_path has precedence over the base in the config.
    gemma, _ = template_of(folder, trust_remote_code=False, model_path=str(models("gemma3_text")))
    assert gemma.stop == "<end_of_turn>"


def test_the_notice_names_the_builtin_template_if_the_base_has_none(of_peft):
    notices = []
    template, _ = template_of(of_peft("llama"), trust_remote_code=False, notice=notices.append)
    (notice,) = notices
    assert notice.endswith(f"It has no chat template: prompts are written with the built-in template {template.name}.")


def test_all_commands_accept_a_peft_adapter_with_a_single_notice(of_peft, tmp_path, capsys):
    folder = str(of_peft("qwen3"))
    data = str(write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:2]))
    for command in (
        ["chat", "--prompt", "Hi", "--max_new_tokens", "4"],
        ["evaluate", "--dataset_path", data, "--output_dir", str(tmp_path / "evaluation"), "--max_new_tokens", "4"],
        ["merge", "--output_dir", str(tmp_path / "merged")],
        ["certify", "--engine", "in-process", "--prompts", "2"],
    ):
        code = main([*command, "--adapter_path", folder])
        said = capsys.readouterr()
        words = " ".join((said.out + said.err).split())
        assert words.count("holds no tokenizer") == 1, command
        # The adapter's B is zero, so the certificate reports that it has no effect.
        assert code == (4 if command[0] == "certify" else 0), words
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()


def test_an_engine_gets_the_bases_tokenizer_with_a_peft_adapter(of_peft, by_heart):
    folder = of_peft("qwen3")
    with ServedFolder(folder) as view:
        assert {"tokenizer.json", "chat_template.jinja", *OF_PEFT} <= {file.name for file in view.iterdir()}
    with ServedFolder(by_heart) as view:
        assert (view / "tokenizer.json").resolve() == by_heart / "tokenizer.json"


def test_an_adapter_of_ours_without_its_tokenizer_is_refused(by_heart, tmp_path):
    for name in (*OF_PEFT, "atomtune.json"):
        shutil.copy(by_heart / name, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises(BadModel, match="its tokenizer files are missing"):
        template_of(tmp_path, trust_remote_code=False)


@pytest.mark.usefixtures("working_directory")
@pytest.mark.parametrize(
    "command",
    [["chat", "--prompt", "x"], ["evaluate"], ["merge", "--output_dir", "merged"], ["serve"]],
    ids=lambda command: command[0],
)
def test_an_adapter_file_passed_as_path_is_refused_naming_its_folder(by_heart, capsys, command):
    # Once, the message was "no such folder" for a path that exists.
    file = by_heart / "adapter_model.safetensors"
    assert main([*command, "--adapter_path", str(file)]) == 2
    assert f"{file} is a file. Pass its folder: --adapter_path {by_heart}" in capsys.readouterr().err


def test_the_command_that_finishes_a_stopped_run_can_be_copied(tmp_path):
    folder = tmp_path / "my run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "adapter_config.json").write_text("{}")
    with pytest.raises(BadModel) as raised:
        template_of(folder, trust_remote_code=False)
    words = shlex.split(str(raised.value).partition("or finish it: ")[2])
    assert words[-4:] == ["train", "--resume", "--output_dir", str(folder)]
