"""Three steps on every family: plain PEFT loads the saved adapter with the same logits, chat answers like generate."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from atomtune.train import ending
from tests.tiny import FAMILIES

TUTORIAL_TARGETS = ["W_pack", "down_proj", "o_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_adapter_gives_the_same_logits_in_peft_and_chat_answers(  # noqa: PLR0917  # pytest passes fixtures
    family, models, dialogues, tmp_path, monkeypatch, capsys
):
    base, out = models(family), tmp_path / "out"
    trained = {}
    monkeypatch.setattr(ending, "_say", lambda job, trainer, *rest: trained.update(model=trainer.model))
    remote = ["--trust_remote_code"] if family == "baichuan_like" else []
    targets = ["--lora_targets", *TUTORIAL_TARGETS] if family == "baichuan_like" else []
    command = ["train", "--model_path", str(base), "--dataset_path", str(dialogues), "--output_dir", str(out)]
    flags = ["--max_steps", "3", "--learning_rate", "1e-2", "--dtype", "float32", *remote, *targets]
    assert main([*command, *flags]) == 0
    if targets:
        assert "W_pack (2)" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=bool(remote))
    loaded = PeftModel.from_pretrained(plain, str(out)).eval()
    asked = [{"role": "user", "content": "你是谁？ (9)"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        ours, theirs = trained["model"].eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    with loaded.disable_adapter(), torch.no_grad():
        assert not torch.allclose(loaded(input_ids=ids).logits, theirs, atol=1e-4), "the adapter changes nothing"

    stops = [tokenizer.convert_tokens_to_ids(json.loads((out / "atomtune.json").read_text())["stop"])]
    made = loaded.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=0, use_cache=not remote
    )
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")  # cut by the limit
    capsys.readouterr()
    chat = ["chat", "--adapter_path", str(out), "--prompt", "你是谁？ (9)", "--max_new_tokens", "12"]
    assert main([*chat, "--dtype", "float32", *remote]) == 0
    assert capsys.readouterr().out.strip() == expected.strip()


def test_remote_code_is_explained_not_run(models, dialogues, tmp_path, capsys):
    command = ["train", "--model_path", str(models("baichuan_like")), "--dataset_path", str(dialogues)]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err


def test_an_adapters_folder_cannot_switch_remote_code_on(models, dialogues, tmp_path, capsys):
    # An older version's model card advised that; a folder from elsewhere could contain anything.
    out = tmp_path / "out"
    command = ["train", "--model_path", str(models("baichuan_like")), "--dataset_path", str(dialogues)]
    assert main([*command, "--output_dir", str(out), "--max_steps", "1", "--trust_remote_code"]) == 0
    card = json.loads((out / "atomtune.json").read_text())
    (out / "atomtune.json").write_text(json.dumps({**card, "trust_remote_code": True}))
    for use in (["chat", "--prompt", "你好"], ["merge", "--output_dir", str(tmp_path / "merged")]):
        capsys.readouterr()
        assert main([*use, "--adapter_path", str(out)]) == 2
        assert "--trust_remote_code" in capsys.readouterr().err


def test_the_tutorials_lora_targets_on_llama_list_the_existing_layers(models, dialogues, tmp_path, capsys):
    """W_pack exists in no Llama: the tutorial silently trained without q, k and v."""
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues)]
    flags = ["--output_dir", str(tmp_path / "out"), "--lora_targets", ",".join(TUTORIAL_TARGETS)]
    assert main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert "W_pack" in said
    assert "q_proj (2)" in said
