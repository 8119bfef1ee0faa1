"""`atomtune verify` and `train --verify`: correct computations hold, and planted faults are found."""

import contextlib
import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atomtune import verify
from atomtune.batch import collate
from atomtune.batch.attention_plan import plan_attention
from atomtune.cli import main
from atomtune.console import Console
from atomtune.data.records import Example
from atomtune.model import fused_lora, layout_trial, liger
from atomtune.model.agreement import Measure
from atomtune.model.liger import Circumstances
from tests.model.test_liger import norms_of


def command(base, data, *more) -> list[str]:
    return ["verify", "--model_path", str(base), "--dataset_path", str(data), *more]


#: The pairs that `make test` tries; `make test-use` tries the others.
FAST = (("float64", "auto"), ("float32", "packed"), ("float32", "padded"), ("bfloat16", "auto"))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in itertools.product(("float64", "float32", "bfloat16"), ("auto", "packed", "padded"))
    ],
)
def test_the_fast_path_passes_verification_and_the_table_reports_it(models, dialogues, capsys, layout, dtype):
    flags = ["--layout", layout, "--dtype", dtype, "--records", "12", "--per_device_train_batch_size", "8"]
    assert main(command(models("llama"), dialogues, *flags)) == 0
    said = capsys.readouterr().out
    assert f"layout {'tree' if layout == 'auto' else layout} against one record at a time, {dtype}" in said
    assert "12 records of dialogues.jsonl" in said
    assert said.count(" holds") == 5
    assert "DOES NOT HOLD" not in said
    assert "is equal to plain transformers + PEFT" in said


def test_the_output_ends_with_the_train_command_with_the_settings_that_were_given(models, dialogues, capsys):
    # The batch size was left out, although --layout, beside it, was named. 16 is what verify takes by itself.
    of_the_run = ["--layout", "padded", "--lora_rank", "4", "--per_device_train_batch_size", "16"]
    base = models("llama")
    assert main(command(base, dialogues, *of_the_run, "--records", "2", "--seed", "7")) == 0
    named = ["--model_path", str(base), "--dataset_path", str(dialogues), *of_the_run]
    assert sorted(capsys.readouterr().out.splitlines()[-1].split(" train ")[1].split()) == sorted(named)


@pytest.mark.slow
def test_an_8_bit_base_passes_verification(models, dialogues, capsys):
    # What LLM.int8 takes out of its 8 bits depends on the batch: every layout failed, and the advice was another one.
    pytest.importorskip("bitsandbytes")
    assert main(command(models("llama"), dialogues, "--quantize", "int8", "--dtype", "float32")) == 0
    said = capsys.readouterr()
    assert "Layout tree is equal to plain transformers + PEFT" in said.out
    assert "This effect is left out of the comparison" in said.out + said.err


def test_a_slow_verification_is_announced_beforehand(models, dialogues, monkeypatch, capsys):
    # --lora_rank 65536 silently took a minute on a base of two small layers.
    flags = ["--records", "6", "--layout", "padded"]
    assert main(command(models("llama"), dialogues, *flags)) == 0
    assert "this takes about" not in capsys.readouterr().out
    monkeypatch.setattr(verify, "LONG_SECONDS", 0.0)
    assert main(command(models("llama"), dialogues, *flags, "--lora_rank", "64")) == 0
    before, _, after = capsys.readouterr().out.partition("this takes about ")
    assert "an adapter of" in after.splitlines()[0]
    assert "plain transformers" not in before


def test_the_reported_work_counts_shared_prefixes_once(models, tmp_path, capsys):
    # All prompts are equal, and a shared prefix is computed once per batch.
    data = tmp_path / "same.jsonl"
    records = [{"instruction": "讲一个很短的故事", "output": answer} for answer in "山水月日风云雨雪"]
    data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert main(command(models("llama"), data, "--dtype", "float64")) == 0
    work = capsys.readouterr().out.split("Work: ")[1]
    padded, computed = (int(word.replace(",", "")) for word in work.split() if word.replace(",", "").isdigit())
    assert computed < padded / 3


def all_see_all(row, **settings):
    """Planted fault: every token sees all tokens before it, siblings too; positions stay right."""
    blind = replace(row, parent=tuple(range(-1, len(row) - 1)), until=(len(row),) * len(row))
    return replace(plan_attention(blind, **settings), position=plan_attention(row, **settings).position)


def positions_by_index(row, **settings):
    plan = plan_attention(row, **settings)
    return replace(plan, position=torch.arange(len(plan.position)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("planted", [all_see_all, positions_by_index])
def test_a_planted_attention_fault_exits_with_4(  # noqa: PLR0917  # pytest passes fixtures
    models, dialogues, monkeypatch, capsys, planted, dtype
):
    monkeypatch.setattr(collate, "plan_attention", planted)
    flags = ["--layout", "tree", "--dtype", dtype, "--records", "12"]
    # The model's own trial would refuse first. It is switched off, so that the comparison has to find the fault.
    monkeypatch.setattr("atomtune.verify.why_padded", _give_rows)
    assert main(command(models("llama"), dialogues, *flags)) == 4
    said = capsys.readouterr()
    assert "DOES NOT HOLD" in said.out
    assert "--layout padded" in said.err


def _give_rows(model) -> None:
    from atomtune.model.loss import innermost
    from atomtune.model.row_attention import ROWS, register

    register()
    innermost(model).set_attn_implementation(ROWS)


@pytest.mark.parametrize(("place", "matrix"), [(2, "lora_A"), (3, "lora_B")])
def test_a_fault_in_the_adapter_gradients_exits_with_4(  # noqa: PLR0917  # pytest passes fixtures
    models, dialogues, monkeypatch, capsys, place, matrix
):
    # Loss and log-probabilities are right; only the gradients are wrong. In a new adapter those of A would be zero.
    right = fused_lora._LowRank.backward

    def scaled(ctx, *grads):
        x, keep, p, scales, *rest = right(ctx, *grads)
        return x, keep, p, scales, *(g * 1.1 if i % 4 == place and g is not None else g for i, g in enumerate(rest))

    monkeypatch.setattr(fused_lora._LowRank, "backward", staticmethod(scaled))
    assert main(command(models("llama"), dialogues, "--dtype", "float32", "--records", "12")) == 4
    said = capsys.readouterr()
    assert said.out.count("DOES NOT HOLD") == 2  # of all weights together, and of the worst
    assert matrix in said.err


@pytest.mark.parametrize("loss", [1.9, 2.1])
def test_a_wrong_loss_alone_does_not_hold(loss):
    plain = verify.Result(2.0, torch.full((8,), -2.0).double(), {"a": torch.ones(3).double()})
    measures = verify._measures(replace(plain, loss=loss), plain, plain, dtype=torch.float32)
    assert [measure.name for measure in measures if not measure.holds] == ["loss (relative)"]


@pytest.mark.parametrize(("in_16_bits", "in_float32", "holds"), [(0, 0, True), (0, 9, False), (9, 0, False)])
def test_a_comparison_in_16_bits_holds_only_with_the_one_in_float32(in_16_bits, in_float32, holds):
    exact, coarse = (
        verify.Comparison(
            layout="tree",
            dtype=dtype,
            measures=(Measure("loss", apart, noise=1.0, least=0.0),),
            worst_weight="",
            targets=1,
            tokens_padded=1,
            tokens_computed=1,
        )
        for dtype, apart in ((torch.float32, in_float32), (torch.bfloat16, in_16_bits))
    )
    compared = replace(coarse, in_float32=exact)
    assert compared.holds is holds is compared.figures()["holds"]


def test_distances_in_16_bits_are_measured_from_float32(monkeypatch):
    exact, plain, ours = (
        verify.Result(loss, torch.full((8,), -loss).double(), {"a": torch.full((3,), loss).double()})
        for loss in (2.0, 2.125, 2.25)
    )
    failed = Measure("loss", difference=9.0, noise=1.0, least=0.0)

    def computed(check, dtype):
        measures = (failed,) if dtype is torch.bfloat16 else (replace(failed, difference=0.0),)
        compared = verify.Comparison("tree", dtype, measures, "", targets=8, tokens_padded=1, tokens_computed=1)
        return (compared, ours, plain) if dtype is torch.bfloat16 else (compared, exact, exact)

    monkeypatch.setattr(verify.Check, "_compare_in", computed)
    names = ("examples", "model", "lora", "wanted", "kernels", "device", "pad_id", "per_batch")
    unused = dict.fromkeys(names) | {"model": SimpleNamespace(quantize=None)}
    compared = verify.Check(**unused, console=Console()).compare(torch.bfloat16)
    assert [(measure.difference, measure.noise) for measure in compared.measures[1:3]] == [(0.25, 0.125)] * 2
    assert compared.holds and compared.in_float32 is not None


def test_a_target_that_a_batch_lacks_has_no_log_probability():
    laid, record = (Example((1, 2, 3, last), (0, 0, 1, 1), "train.jsonl:1") for last in (4, 5))
    batch = collate.Collator(layout="tree", pad_id=0, as_examples=lambda row: ()).lay([laid])
    (scores,) = verify._by_record(batch, torch.tensor([-1.0, -2.0]), [record])
    assert scores[0] == -1 and scores[1].isnan()


@pytest.fixture
def no_noise(monkeypatch):
    """In 16 bits two plain runs agree by chance, as those of a record that is sensitive to rounding did."""
    another = verify.another_plain_way
    monkeypatch.setattr(
        verify,
        "another_plain_way",
        lambda model: contextlib.nullcontext() if model.dtype is torch.bfloat16 else another(model),
    )


IN_16_BITS = ("--dtype", "bfloat16", "--records", "12")


@pytest.mark.slow
def test_plain_runs_that_agree_by_chance_cause_no_false_failure(models, dialogues, capsys, no_noise):
    assert main(command(models("llama"), dialogues, *IN_16_BITS)) == 0
    said = capsys.readouterr().out
    assert "layout tree in bfloat16 against one record at a time in float32" in said
    assert said.count(" holds") == 10 and "DOES NOT HOLD" not in said
    assert "sensitive to rounding" in said and "is equal to plain transformers + PEFT" in said


@pytest.mark.slow
def test_a_fault_only_in_16_bit_exits_with_4(models, dialogues, monkeypatch, capsys, no_noise):
    right = fused_lora._LowRank.backward

    def wrong(ctx, *grads):
        x, *rest = right(ctx, *grads)
        return (x if x is None or x.dtype != torch.bfloat16 else x * 2), *rest

    monkeypatch.setattr(fused_lora._LowRank, "backward", staticmethod(wrong))
    assert main(command(models("llama"), dialogues, *IN_16_BITS)) == 4
    in_float32, in_16_bits = capsys.readouterr().out.split("layout tree in bfloat16")
    assert in_float32.count(" holds") == 5 and "DOES NOT HOLD" in in_16_bits


def test_without_memory_for_float32_the_16_bit_verdict_stands(models, dialogues, monkeypatch, capsys, no_noise):
    load = verify.load_base

    def scarce(spec):
        if spec.dtype is torch.float32:
            raise MemoryError
        return load(spec)

    monkeypatch.setattr(verify, "load_base", scarce)
    assert main(command(models("llama"), dialogues, *IN_16_BITS)) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "the memory does not hold the base in float32" in said and "DOES NOT HOLD" in said


@pytest.mark.slow
def test_verify_keeps_one_base_in_memory_at_a_time(models, dialogues, no_noise, one_base_at_a_time):
    # Adapter and fused layers refer to themselves, so four bases were in memory at the end.
    assert main(command(models("llama"), dialogues, *IN_16_BITS)) == 0
    assert len(one_base_at_a_time) == 4


def test_a_verified_run_loads_its_model_after_the_last_one_is_freed(models, dialogues, tmp_path, one_base_at_a_time):
    assert train(models("llama"), dialogues, tmp_path / "out", "--verify", "--dtype", "float32") == 0
    assert len(one_base_at_a_time) == 3


@pytest.fixture
def liger_kernels(monkeypatch):
    """As on a GPU with Liger installed; with a factor other than 1, its norms are wrong.

    The model's own trial would refuse wrong ones. It is switched off, so that the comparison has to find the fault.
    """

    def install(factor: float) -> None:
        monkeypatch.setattr(liger, "apply_liger_kernel", norms_of(factor))
        monkeypatch.setattr(Circumstances, "tries", True)
        monkeypatch.setattr(layout_trial, "changed_by", lambda model, change: change() and None)

    return install


PATCHED_FILE = "transformers.models.llama.modeling_llama"


def test_ligers_kernels_are_verified_and_removed_for_the_plain_side(models, dialogues, capsys, liger_kernels):
    liger_kernels(1.0)
    assert main(command(models("llama"), dialogues, "--dtype", "float32", "--records", "12")) == 0
    said = capsys.readouterr().out
    assert "computed by Liger's kernels" in said and "DOES NOT HOLD" not in said
    assert not hasattr(sys.modules[PATCHED_FILE], "planted")


def test_a_fault_in_ligers_kernels_exits_with_4(models, dialogues, capsys, liger_kernels):
    # verify and --verify once left the kernels out, which a run on a GPU uses.
    liger_kernels(1.3)
    assert main(command(models("llama"), dialogues, "--dtype", "float32", "--records", "12")) == 4
    assert "DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), pytest.param(1.3, 4, marks=pytest.mark.slow)])
def test_train_with_verify_compares_ligers_kernels(models, dialogues, tmp_path, liger_kernels, factor, code):  # noqa: PLR0917  # pytest passes fixtures
    liger_kernels(factor)
    assert train(models("llama"), dialogues, tmp_path / "out", "--verify", "--dtype", "float32") == code
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["verified"]["holds"] is (code == 0)
    assert not hasattr(sys.modules[PATCHED_FILE], "planted")


def test_a_layout_that_would_not_be_exact_is_refused(models, dialogues, capsys):
    flags = ["--trust_remote_code", "--layout", "tree"]
    assert main(command(models("baichuan_like"), dialogues, *flags)) == 2
    assert "its forward takes no position_ids" in capsys.readouterr().err


def test_a_remote_code_model_is_verified_in_the_padded_layout(models, dialogues, capsys):
    assert main(command(models("baichuan_like"), dialogues, "--trust_remote_code", "--records", "8")) == 0
    assert "layout padded against one record at a time" in capsys.readouterr().out


def test_a_passed_verification_suggests_the_train_command(models, dialogues, capsys):
    words = command(models("llama"), dialogues, "--dtype", "float32", "--records", "4", "--lora_rank", "4")
    assert main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    named = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues)]
    assert sorted(last.split(" train ")[1].split()) == sorted([*named, "--dtype", "float32", "--lora_rank", "4"])


def test_verify_needs_a_model_and_records(capsys):
    assert main(["verify"]) == 2
    said = capsys.readouterr().err
    assert "--model_path is missing: the base model" in said
    assert "--dataset_path is missing: the records" in said


def train(base, data, out, *more) -> int:
    walk = ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)]
    return main([*walk, "--max_steps", "2", *more])


@pytest.mark.parametrize(
    ("flags", "layout"), [([], "tree"), pytest.param(["--neftune_noise_alpha", "5"], "padded", marks=pytest.mark.slow)]
)
def test_train_with_verify_writes_the_result_to_run_json(models, dialogues, tmp_path, flags, layout):
    assert train(models("llama"), dialogues, tmp_path / "out", "--verify", "--dtype", "float64", *flags) == 0
    found = json.loads((tmp_path / "out" / "run.json").read_text())["verified"]
    assert found["holds"] is True
    assert (found["layout"], found["dtype"]) == (layout, "float64"), "as the run itself is laid out"
    loss = found["measures"]["loss (relative)"]
    assert 0 <= loss["apart"] <= loss["allowed"] < 1e-5
    assert found["targets"] > 0


def test_a_run_that_fails_verification_does_not_start(models, dialogues, monkeypatch, tmp_path):
    right = fused_lora._LowRank.forward
    monkeypatch.setattr(
        fused_lora._LowRank, "forward", staticmethod(lambda *given: tuple(1.2 * out for out in right(*given)))
    )
    out = tmp_path / "out"
    assert train(models("llama"), dialogues, out, "--verify", "--dtype", "float32") == 4
    record = json.loads((out / "run.json").read_text())
    assert record["verified"]["holds"] is False
    assert not list(out.glob("checkpoint-*"))
    assert not (out / "adapter_model.safetensors").exists()
