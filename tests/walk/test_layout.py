"""`--layout`: its messages, when it pays, and that the run is the same in every layout."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.integrations import neftune
from transformers.integrations.neftune import neftune_post_forward_hook

from atomtune.cli import main
from atomtune.model import memory
from atomtune.model.memory import activation_bytes
from tests.conftest import write_jsonl
from tests.train.test_trainer import relative_difference


def train(base, data, out, *more) -> int:
    return main(["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out), *more])


def record_of(out) -> dict:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--gradient_checkpointing", "true"], marks=pytest.mark.slow),
        ["--gradient_accumulation_steps", "2"],
        pytest.param(["--label_smoothing_factor", "0.1"], marks=pytest.mark.slow),
        pytest.param(["--per_device_train_batch_size", "1"], marks=pytest.mark.slow),
        pytest.param(["--max_seq_length", "40"], marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "accumulation", "smoothing", "one record a batch", "shortened"],
)
def test_every_layout_gives_the_same_losses_and_adapter(models, dialogues, tmp_path, flags):
    # RMSNorm computes in float32, so branches that meet in it are rounded: 1e-7 per step.
    exact = ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "4", "--learning_rate", "1e-2"]
    exact += ["--logging_steps", "1", "--eval_size", "8", "--optim", "sgd", "--per_device_train_batch_size", "8"]
    for layout in ("padded", "packed", "tree"):
        out = tmp_path / layout
        assert train(models("llama"), dialogues, out, *exact, *flags, "--layout", layout) == 0
        assert record_of(out)["layout"] == layout
    padded = record_of(tmp_path / "padded")
    for layout in ("packed", "tree"):
        other = record_of(tmp_path / layout)
        assert other["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-6)
        for ours, theirs in zip(other["loss_history"], padded["loss_history"], strict=True):
            assert ours["step"] == theirs["step"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        for key in ("prompt_tokens", "target_tokens", "tokens_padded", "records_used"):
            assert other[key] == padded[key], key
        adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in (layout, "padded")]
        assert relative_difference(*adapters) < 1e-6


def test_layout_auto_reports_its_choice_and_the_saved_work(models, dialogues, tmp_path, capsys):
    assert train(models("llama"), dialogues, tmp_path / "out", "--max_steps", "1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "layout tree: records with a common prefix share it; tokens " in said
    assert "less work (3 batches tried)" in said


def test_a_larger_batch_with_fewer_tokens_is_suggested_and_gives_the_same_run(models, dialogues, tmp_path):
    exact = ["--dtype", "float64", "--lora_dropout", "0", "--max_steps", "3", "--optim", "sgd", "--eval_size", "0"]
    exact += ["--logging_steps", "1", "--learning_rate", "1e-2"]
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    large = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    records = {}
    for name, batch in (("small", small), ("large", large)):
        assert train(models("llama"), dialogues, tmp_path / name, *exact, *batch) == 0
        records[name] = record_of(tmp_path / name)
    (notice,) = [notice for notice in records["small"]["notices"] if "fewer tokens" in notice]
    assert " ".join(large) in notice
    assert not [notice for notice in records["large"]["notices"] if "fewer tokens" in notice]
    assert records["large"]["tokens_computed"] < records["small"]["tokens_computed"]
    losses = [[entry["loss"] for entry in record["loss_history"]] for record in records.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_layout_auto_packs_records_without_common_prefixes(models, tmp_path, capsys):
    # All records would share role markers, so this template has none.
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    data = write_jsonl(
        tmp_path / "apart.jsonl",
        [{"instruction": chr(0x4E00 + 7 * n) * (5 + n % 9), "output": "好" * (1 + n % 5)} for n in range(40)],
    )
    flags = ["--max_steps", "1", "--template", str(template)]
    assert train(models("qwen3"), data, tmp_path / "out", *flags) == 0
    assert record_of(tmp_path / "out")["layout"] == "packed"
    assert "layout packed: records are laid end to end without padding" in capsys.readouterr().out


def test_a_model_unsuited_to_the_tree_layout_trains_padded_with_the_reason(models, dialogues, tmp_path, capsys):
    assert train(models("baichuan_like"), dialogues, tmp_path / "out", "--trust_remote_code", "--max_steps", "2") == 0
    record = record_of(tmp_path / "out")
    assert record["layout"] == "padded"
    assert record["tokens_computed"] == record["tokens_padded"]
    said = " ".join(capsys.readouterr().out.split())
    assert "layout padded: one record per row, because its forward takes no position_ids." in said


def test_neftune_noise_uses_one_record_per_row(models, dialogues, tmp_path, monkeypatch, capsys):
    # In a row of 16 records, the library's noise silently had a quarter of its size.
    shapes = []

    def noted(module, inputs, output):
        if module.training:
            shapes.append(output.shape)
        return neftune_post_forward_hook(module, inputs, output)

    monkeypatch.setattr(neftune, "neftune_post_forward_hook", noted)
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--eval_size", "0", "--neftune_noise_alpha"]
    assert train(models("llama"), dialogues, tmp_path / "out", *flags, "5") == 0
    assert [shape[0] for shape in shapes] == [8, 8]
    assert record_of(tmp_path / "out")["layout"] == "padded"
    said = " ".join(capsys.readouterr().out.split())
    assert "one record per row, because the noise of --neftune_noise_alpha is drawn for each record" in said
    assert train(models("llama"), dialogues, tmp_path / "none", *flags, "0") == 0
    assert record_of(tmp_path / "none")["layout"] == "tree"


def test_a_layout_that_would_not_be_exact_is_refused_before_a_step(models, dialogues, tmp_path, capsys):
    flags = ["--trust_remote_code", "--layout", "tree"]
    assert train(models("baichuan_like"), dialogues, tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert "its forward takes no position_ids" in said
    assert "--layout padded" in said


@pytest.mark.slow
def test_activation_recomputation_depends_on_the_chosen_layouts_token_count(models, tmp_path, monkeypatch, capsys):
    # Counted as padded, a tree would be recomputed on a card with enough room, and lose two fifths of its speed.
    data = tmp_path / "styled.jsonl"
    style = "Answer as the keeper of a lighthouse would, in one short line and without a hurry. " * 3
    write_jsonl(data, [{"instruction": style, "input": f"Who {n}?", "output": f"I, {n}."} for n in range(32)])
    flags = ("--max_steps", "1", "--per_device_train_batch_size", "16", "--lora_dropout", "0", "--dtype", "float32")
    for layout in ("tree", "padded"):
        out = tmp_path / f"count-{layout}"
        assert train(models("llama"), data, out, *flags, "--layout", layout) == 0
    computed = {layout: record_of(tmp_path / f"count-{layout}")["tokens_computed"] for layout in ("tree", "padded")}
    assert 1.4 * computed["tree"] < 0.95 * computed["padded"], f"this shows nothing: {computed}"
    config = AutoConfig.from_pretrained(models("llama"))
    enough = activation_bytes(config, tokens=int(0.95 * computed["padded"]), element_bytes=4) / memory.USABLE
    monkeypatch.setattr(memory, "free_bytes", lambda device: enough)
    for layout, recomputed in (("tree", False), ("padded", True)):
        out = tmp_path / layout
        assert train(models("llama"), data, out, *flags, "--layout", layout) == 0
        assert record_of(out)["activations_recomputed"] == recomputed
    # The padded step is a little too large, so recomputing one of the two layers is enough.
    assert record_of(tmp_path / "padded")["share_of_layers_recomputed"] == 0.5
    assert "activations of 1 of 2 layers are recomputed: a step of" in " ".join(capsys.readouterr().out.split())
    trained = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("count-padded", "padded")]
    assert relative_difference(*trained) == 0
