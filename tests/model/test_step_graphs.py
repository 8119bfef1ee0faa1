"""Step graphs: replays compute what the model computes.

A CPU has no CUDA graphs. Here a recording does its work again with the tensors that it got, which tests everything but
the device's part; `benchmarks.gpu` tests that.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from atomtune.batch.attention_plan import plan_attention
from atomtune.batch.collate import Batch, Collator
from atomtune.data.records import Example
from atomtune.model import step_graphs
from atomtune.model.fused_lora import compute_together
from atomtune.model.layout_support import mixer_method_of, why_padded, windows_of
from atomtune.model.loss import target_nats
from atomtune.model.step_graphs import SEEN_BEFORE, GpuRecorder, StepGraphs
from tests.batch.test_attention_plan import rows
from tests.hybrids import hybrid
from tests.model.test_layout_support import WORDS, adapted, build, gradients, with_adapter

#: float64: filling up a row changes only the order of sums.
EXACT = 1e-12
#: Masked calls, sinks, soft caps and two kinds of windows; by spans, as on a GPU.
FAMILIES = ("llama", "gemma3_text", "gemma2", "granite_swa")


class Tape:
    """A recorder that does the work again at every replay."""

    def __init__(self, *, free: int = 2**30) -> None:
        self.recorded = self.played = 0
        self.free, self.released = free, False

    def step_bytes(self) -> int:
        return 2**20

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        self.released = True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()

        def play() -> None:
            self.played += 1
            work()

        return play


def batches(model: Any, layout: str, *, count: int) -> list[Batch]:
    """Records that share a beginning, as rows of about the same length."""
    collator = Collator(
        layout=layout,
        pad_id=0,
        as_examples=lambda row: (Example(**row),),
        windows=windows_of(model),
        cut="spans",
        mixers=mixer_method_of(model),
    )
    draw = Random(3)
    beginning = tuple(draw.randrange(3, WORDS) for _ in range(24))
    made = []
    for _ in range(count):
        examples = []
        for n in range(4):
            own = tuple(draw.randrange(3, WORDS) for _ in range(draw.randint(8, 12)))
            learn = (0,) * len(beginning) + tuple(draw.choice((0, 1, 1, 2)) for _ in own)
            examples.append(Example(beginning + own, learn, f"train.jsonl:{n + 1}"))
        made.append(collator.lay(examples))
    return made


def graphs_of(model: Any, tape: Tape, notices: list[str] | None = None) -> StepGraphs:
    said = [] if notices is None else notices
    return StepGraphs(model, recorder=tape, label_smoothing=0.1, notice=said.append)


def result(model: Any, nats: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    (nats / 8).backward()  # 1 / 8 is exact, also for norms in float32
    return nats.item(), gradients(model)


@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_match_the_models_loss_and_gradients(family, layout):
    model = copy.deepcopy(adapted(family)).train()
    compute_together(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    tape = Tape()
    graphs = graphs_of(model, tape)
    for batch in batches(model, layout, count=8):
        own_nats, own = result(model, target_nats(model, batch, label_smoothing=0.1)[0])
        nats, played = result(model, graphs.nats(batch))
        assert nats == pytest.approx(own_nats, rel=EXACT)
        for name, gradient in own.items():
            torch.testing.assert_close(played[name], gradient, rtol=EXACT, atol=EXACT)
    assert tape.played > 0, "nothing was played"
    assert tape.recorded < tape.played, "each shape is recorded once"


def test_a_shape_is_recorded_only_after_it_repeats():
    model = copy.deepcopy(adapted("llama")).train()
    tape = Tape()
    graphs = graphs_of(model, tape)
    batch = batches(model, "tree", count=1)[0]
    recorded = []
    for _ in range(SEEN_BEFORE + 3):
        graphs.nats(batch)
        recorded.append(tape.recorded)
    assert recorded == [0] * SEEN_BEFORE + [1, 1, 1]


def test_a_replay_reads_the_current_weights():
    # A recording that keeps copies of the weights from the first replay would train on old weights.
    model = copy.deepcopy(adapted("llama")).train()
    compute_together(model, input_ids=torch.zeros(1, 2, dtype=torch.long))
    graphs = graphs_of(model, Tape())
    batch = batches(model, "tree", count=1)[0]
    for _ in range(SEEN_BEFORE + 1):
        before = graphs.nats(batch).item()
    with torch.no_grad():
        for weight in graphs.weights:
            weight.mul_(1.5)
    after = graphs.nats(batch).item()
    assert after != pytest.approx(before, rel=1e-6)
    assert after == pytest.approx(target_nats(model, batch, label_smoothing=0.1)[0].item(), rel=EXACT)


def test_a_first_replay_that_differs_disables_replaying(monkeypatch):
    # The planted bug: another batch is replayed than the one passed in.
    model = copy.deepcopy(adapted("llama")).train()
    first, second = batches(model, "tree", count=2)
    monkeypatch.setattr(step_graphs, "_with_tensors", lambda batch, tensors: second)
    notices: list[str] = []
    graphs = graphs_of(model, Tape(), notices)
    for _ in range(SEEN_BEFORE + 2):
        nats = graphs.nats(first)
    assert nats.item() == pytest.approx(target_nats(model, first, label_smoothing=0.1)[0].item(), rel=EXACT)
    assert len(notices) == 1
    assert "gradients differ by" in notices[0]


class Refusing(Tape):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")


def test_a_model_that_cannot_be_recorded_runs_without_graphs():
    model = copy.deepcopy(adapted("llama")).train()
    notices: list[str] = []
    graphs = graphs_of(model, Refusing(), notices)
    batch = batches(model, "tree", count=1)[0]
    for _ in range(SEEN_BEFORE + 3):
        nats = graphs.nats(batch)
    assert nats.item() == pytest.approx(target_nats(model, batch, label_smoothing=0.1)[0].item(), rel=EXACT)
    assert notices == [
        "steps are not replayed as CUDA graphs, which costs small steps some speed: "
        "CUDA error: operation not permitted when stream is capturing"
    ]


class Capturing(Tape):
    """A recorder that fails, as a capture does, if the work waits for the device to know a tensor's size."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def waits(*_arguments: Any, **_keywords: Any) -> Any:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        with patch.object(torch, "unique", waits):
            return super().record(work)


def test_steps_with_lora_on_the_output_matrix_are_recorded():
    # The recording took its weights for sharded ones, and computed the head in a way that waits for the device.
    model = with_adapter(build("llama"), "lm_head").train()
    notices: list[str] = []
    graphs = graphs_of(model, Capturing(), notices)
    batch = batches(model, "tree", count=1)[0]
    own_nats, own = result(model, target_nats(model, batch, label_smoothing=0.1)[0])
    assert any("lm_head" in name for name in own)
    for _ in range(SEEN_BEFORE + 1):
        nats, played = result(model, graphs.nats(batch))
    assert notices == []
    assert graphs.figures()["replayed"] == 1
    assert nats == pytest.approx(own_nats, rel=EXACT)
    for name, gradient in own.items():
        torch.testing.assert_close(played[name], gradient, rtol=EXACT, atol=EXACT)


def test_long_rows_and_padded_rows_are_never_recorded(monkeypatch):
    model = copy.deepcopy(adapted("llama")).train()
    monkeypatch.setattr(step_graphs, "MOST_WORK", 32 * sum(weight.numel() for weight in model.parameters()))
    tape = Tape()
    graphs = graphs_of(model, tape)
    padded = Collator(layout="padded", pad_id=0, as_examples=lambda row: (Example(**row),)).lay(
        [Example((1, 2, 3), (0, 1, 1), "train.jsonl:1")]
    )
    for batch in (batches(model, "tree", count=1)[0], padded):
        for _ in range(SEEN_BEFORE + 2):
            graphs.nats(batch)
    assert tape.recorded == 0


def recordings_of(model: torch.nn.Module) -> int:
    """How many shapes are recorded if one batch is computed again and again."""
    tape = Tape()
    graphs = graphs_of(model, tape)
    for batch in batches(model, "tree", count=1) * (SEEN_BEFORE + 2):
        graphs.nats(batch)
    return tape.recorded


def test_a_batch_that_comes_again_is_recorded_once():
    assert recordings_of(copy.deepcopy(adapted("llama")).train()) == 1


def test_rows_of_layers_that_carry_a_state_are_never_recorded():
    # Which state a branch starts from is in no tensor: another tree of the same sizes would be computed by the first.
    model = hybrid("lfm2").train()
    assert why_padded(model) is None and mixer_method_of(model) == "fork"
    assert recordings_of(model) == 0


def test_weights_in_two_dtypes_are_never_recorded():
    # All gradients of a recording are in one tensor, so some would be rounded to the dtype of others.
    model = copy.deepcopy(adapted("llama")).train()
    model.coarse = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert recordings_of(model) == 0


def test_weights_that_a_step_does_not_reach_get_a_gradient_of_zero():
    # As those of an expert that no token of the batch chose: without one, the run ended or replayed no more steps.
    model = copy.deepcopy(adapted("llama")).train()
    model.unreached = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    notices: list[str] = []
    graphs = graphs_of(model, Tape(), notices)
    first, second = batches(model, "tree", count=2)
    for batch in [*[first] * (SEEN_BEFORE + 1), second]:
        model.zero_grad()
        graphs.nats(batch).backward()
        assert all(weight.grad.any() for weight in graphs.weights if weight is not model.unreached)
    assert graphs.figures()["replayed"] == 1 and notices == []
    assert model.unreached.grad is not None and not model.unreached.grad.any()


class Drawing(Tape):
    """A recorder that leaves the random numbers as they are, as a capture does, which computes nothing."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.random.fork_rng():
            return super().record(work)


def test_recording_a_step_draws_no_random_numbers_beyond_the_steps_own():
    # A resumed run records at other steps, and would go on with other dropout.
    model = copy.deepcopy(adapted("llama")).train()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    graphs = graphs_of(model, Drawing())
    (batch,) = batches(model, "tree", count=1)
    torch.manual_seed(3)
    losses = [graphs.nats(batch).item() for _ in range(SEEN_BEFORE + 1)]
    after = torch.get_rng_state()
    assert graphs.figures()["replayed"] == 1
    torch.manual_seed(3)
    own = [target_nats(model, batch, label_smoothing=0.1)[0].item() for _ in range(SEEN_BEFORE + 1)]
    assert losses == pytest.approx(own, rel=EXACT) and len(set(own)) == len(own)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_batch_without_targets_ends_no_recording():
    # Its logits are gathered in a way that waits for the device, and such a batch may come again.
    model = copy.deepcopy(adapted("llama")).train()
    notices: list[str] = []
    graphs = graphs_of(model, Capturing(), notices)
    (batch,) = batches(model, "tree", count=1)
    empty = {**batch, **{name: batch[name][:0] for name in step_graphs._OF_TARGETS}}
    for _ in range(SEEN_BEFORE + 2):
        assert graphs.nats(empty).item() == 0
    assert notices == []


def test_rows_whose_longest_spans_differ_are_recorded_apart():
    # A kernel is launched for the longest span that it was recorded with, and computes nothing beyond it.
    model = copy.deepcopy(adapted("llama")).train()
    tape = Tape()
    graphs = graphs_of(model, tape)
    (batch,) = batches(model, "tree", count=1)
    spans = {w: replace(each, longest_queries=2 * each.longest_queries) for w, each in batch["plan"].spans.items()}
    longer = {**batch, "plan": replace(batch["plan"], spans=spans)}
    for each in [*[batch] * (SEEN_BEFORE + 1), *[longer] * (SEEN_BEFORE + 1)]:
        graphs.nats(each)
    assert tape.recorded == 2


def test_nothing_is_recorded_unless_the_longest_step_still_fits_in_memory():
    # A step of 64 tokens took 1 MiB, so its recording plus another such step needs 2 MiB.
    model = copy.deepcopy(adapted("llama")).train()
    batch = batches(model, "tree", count=1)[0]
    assert batch["input_ids"].shape[1] == 64
    recorded = []
    for mebibytes in (2, 3):
        tape = Tape(free=mebibytes * 2**20)
        graphs = graphs_of(model, tape)
        for _ in range(SEEN_BEFORE + 1):
            graphs.nats(batch)
        recorded.append(tape.recorded)
    assert recorded == [0, 1]


def test_a_step_out_of_memory_releases_the_recordings_and_is_computed_directly(monkeypatch):
    model = copy.deepcopy(adapted("llama")).train()
    first, second = batches(model, "tree", count=2)
    tape, notices = Tape(), []
    graphs = graphs_of(model, tape, notices)
    for _ in range(SEEN_BEFORE + 1):
        graphs.nats(first)
    assert tape.recorded == 1
    own_nats, own = result(model, target_nats(model, second, label_smoothing=0.1)[0])

    def full(*_arguments: Any, **_keywords: Any) -> Any:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    graphs.nats(second)
    nats, gradients_then = result(model, graphs.nats(second))
    assert tape.released and not graphs._recordings, "no recording keeps its memory"
    assert notices == [
        "steps are not replayed as CUDA graphs, which costs small steps some speed: a step of 80 tokens did not fit in "
        "memory along with them"
    ]
    assert nats == pytest.approx(own_nats, rel=EXACT)
    for name, gradient in own.items():
        torch.testing.assert_close(gradients_then[name], gradient, rtol=EXACT, atol=EXACT)
    graphs.nats(first)
    assert (graphs.figures()["shapes"], graphs.figures()["replayed"]) == (1, 1), "what was recorded and replayed before"


@pytest.mark.parametrize("window", [None, 5])
def test_rounded_spans_keep_what_each_query_attends_to(window):
    for row in rows(60, longest=30):
        tokens = len(row) + 3
        spans = plan_attention(row, windows=(window,), width=tokens, cut="spans").spans[window]
        filled = spans.rounded(tokens)
        real = len(spans.query_starts)
        assert filled.query_starts[:real].tolist() == spans.query_starts.tolist()
        assert filled.key_starts[:real].tolist() == spans.key_starts.tolist()
        assert filled.query_starts[real:].unique().tolist() == [tokens], "what was added asks nothing"
        assert filled.key_starts.diff().min() >= 0
        keys = tokens if filled.keys is None else len(filled.keys)
        assert int(filled.key_starts[-1]) == keys
        if spans.keys is not None:
            assert filled.keys[: len(spans.keys)].tolist() == spans.keys.tolist()
        assert filled.longest_queries >= spans.longest_queries
        assert filled.longest_keys >= spans.longest_keys
        # A kernel skips what lies beyond the longest: the gradients of filled-up keys were once never written.
        assert filled.longest_keys >= int(filled.key_starts.diff().max())
        # Each shape is a recording of its own, so there are few: powers of two, and keys in steps of 512.
        sizes = (len(filled.query_starts), filled.longest_queries, filled.longest_keys)
        assert all(size.bit_count() == 1 for size in sizes)
        assert filled.keys is None or len(filled.keys) % 512 == 0


def test_new_leaves_share_the_weights_memory_and_are_removed_afterwards():
    # Found on a GPU: weights that an earlier step's graph still referenced could not get a recording's gradients.
    model = copy.deepcopy(adapted("llama"))
    before = {name: (weight, weight.requires_grad) for name, weight in model.named_parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with step_graphs._new_leaves(model) as leaves:
        assert [leaf.data_ptr() for leaf in leaves] == [weight.data_ptr() for weight in trained]
        now = [weight for weight in model.parameters() if weight.requires_grad]
        assert [id(weight) for weight in now] == [id(leaf) for leaf in leaves]
        assert not {id(leaf) for leaf in leaves} & {id(weight) for weight in trained}
    after = dict(model.named_parameters())
    assert all(after[name] is weight and weight.requires_grad == trains for name, (weight, trains) in before.items())


def test_a_failure_during_capture_is_reported_and_the_device_is_freed(monkeypatch):
    # The end of a capture hides the cause, and the random generator keeps waiting until another capture ends.
    captures: list[bool] = []

    def capture(_recorder, work, *, shares=True):
        captures.append(shares)
        try:
            work()
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  # as torch does
        return work

    def work() -> None:
        raise RuntimeError("the legacy stream would depend on a capturing one")

    recorder = GpuRecorder.__new__(GpuRecorder)
    recorder.device = torch.device("cpu")
    monkeypatch.setattr(GpuRecorder, "_capture", capture)
    with pytest.raises(RuntimeError, match="the legacy stream"):
        recorder.record(work)
    assert captures == [True, False], "a second one, which ends and shares no memory with the first"
