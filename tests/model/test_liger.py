"""Liger: when its kernels are tried, their results are compared, and no trace of them stays if these differ.

The package needs a GPU's compiler, so a stand-in replaces its one function. Like the package, it binds a `forward` to
norms and replaces a function in the model's file.
"""

import json
import sys

import pytest
import torch

from atomtune.cli import main
from atomtune.model import layout_trial, liger
from atomtune.model.liger import Circumstances, Patch, kernel_config, problems
from atomtune.model.loss import innermost
from atomtune.train import model as train_model
from tests.hybrids import hybrid


@pytest.mark.parametrize(
    ("wanted", "device", "is_installed", "is_sharded", "tries"),
    [
        (None, "cuda", True, False, True),
        (None, "cuda", False, False, False),
        (None, "cuda", True, True, False),
        (None, "cpu", True, False, False),
        (None, "xpu", True, False, False),
        (True, "xpu", True, False, True),
        (True, "cuda", True, False, True),
        (False, "cuda", True, False, False),
    ],
)
def test_kernels_are_tried_on_cuda_if_installed_and_not_disabled(wanted, device, is_installed, is_sharded, tries):
    assert Circumstances(wanted, device, is_installed, is_sharded).tries is tries


def test_installing_liger_is_suggested_only_where_it_would_help():
    assert "pip install liger-kernel" in str(Circumstances(None, "cuda", False).hint)
    for elsewhere in (Circumstances(None, "cpu", False), Circumstances(False, "cuda", False)):
        assert elsewhere.hint is None


def test_impossible_liger_settings_are_refused():
    assert list(problems(Circumstances(None, "cuda", True))) == []
    assert "this run uses a CPU" in next(problems(Circumstances(True, "cpu", True)))
    assert "pip install" in next(problems(Circumstances(True, "cuda", False)))
    fused = {"fused_linear_cross_entropy": True, "rope": False}
    assert "fused_linear_cross_entropy" in next(problems(Circumstances(True, "cuda", True, config=fused)))


def test_ligers_losses_stay_off_and_other_kernels_follow_the_user():
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert kernel_config(None) == off
    assert kernel_config({"rope": False}) == {"rope": False, **off}


def test_liger_on_a_cpu_is_refused_before_anything_is_read(models, dialogues, tmp_path, capsys):
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues)]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--use_liger_kernel", "true"]) == 2
    assert "Liger's kernels run on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def norms_of(factor):
    """The stand-in for the package's function: its own RMS norms, which are right with a factor of 1."""

    def forward(self, x):
        wide = x.double()
        size = (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (self.weight * factor * wide / size).to(x.dtype)

    def put_in(inner, _config):
        sys.modules[type(inner).__module__].planted = put_in
        for module in inner.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.offset = 0.0
                vars(module)["forward"] = forward.__get__(module)

    return put_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.3, False)])
def test_kernels_that_change_the_results_are_detected_and_removed(monkeypatch, dtype, factor, holds):
    monkeypatch.setattr(liger, "apply_liger_kernel", norms_of(factor))
    model = hybrid("lfm2").to(dtype)
    file = sys.modules[type(innermost(model)).__module__]
    ids = torch.arange(3, 60)[None]
    before = model(input_ids=ids).logits
    patch = Patch(model, {})
    reason = layout_trial.changed_by(model, patch.put_in)
    assert (reason is None) is holds
    assert hasattr(file, "planted")
    if not holds:
        assert "allowed by the model's own noise" in str(reason)
        assert not torch.equal(model(input_ids=ids).logits, before)
    patch.take_out()
    assert not hasattr(file, "planted")
    assert torch.equal(model(input_ids=ids).logits, before)


def without_gradient(output):
    return output.detach()


def with_larger_gradient(output):
    output.register_hook(lambda gradient: 1.3 * gradient)
    return output


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [(without_gradient, "other weights have a gradient"), (with_larger_gradient, "gradients of all weights")],
)
def test_kernels_that_change_only_the_backward_pass_are_detected(spoiled, words):
    model = hybrid("lfm2")
    layer = innermost(model).model.layers[0].feed_forward.w2
    reason = layout_trial.changed_by(
        model, lambda: layer.register_forward_hook(lambda _layer, _inputs, output: spoiled(output))
    )
    assert words in str(reason)


def test_a_failing_kernel_is_rejected_with_a_reason_and_no_crash(monkeypatch):
    def fails(_inner, _config):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(liger, "apply_liger_kernel", fails)
    model = hybrid("lfm2")
    assert "no compiler here" in str(layout_trial.changed_by(model, Patch(model, {}).put_in))


def test_a_model_without_kernels_in_the_package_is_said_to_have_none(monkeypatch):
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda _inner, _config: None)
    said: list[str] = []
    model = hybrid("lfm2").train()
    assert not liger.use(model, Circumstances(True, "cuda", True), say=said.append)
    assert said == ["Liger's kernels are not used: it has none for lfm2."]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("factor", "used"), [(1.0, True), (1.3, False)])
def test_a_run_trains_and_reports_whether_liger_kernels_are_used(  # noqa: PLR0917  # pytest passes fixtures
    models, dialogues, tmp_path, monkeypatch, capsys, factor, used
):
    monkeypatch.setattr(liger, "apply_liger_kernel", norms_of(factor))
    monkeypatch.setattr(train_model, "liger_circumstances", lambda *_: Circumstances(None, "cuda", True))
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "2"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    # Left in transformers' file, a Triton kernel was once called by later models on a CPU and in float64.
    assert not hasattr(sys.modules["transformers.models.llama.modeling_llama"], "planted")
    assert json.loads((tmp_path / "run.json").read_text())["liger_kernels"] is used
    printed = capsys.readouterr().out
    assert ("computed by Liger's kernels" in printed) is used
    assert ("Liger's kernels are not used" in printed) is not used
