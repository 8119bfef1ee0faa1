"""Arguments: what a run passes to the Trainer besides the user's own settings."""

import transformers
from transformers import TrainingArguments

from atomtune.model.load import quiet_libraries
from atomtune.program_state import program_state_kept
from atomtune.settings.read import read_train
from atomtune.train.arguments import trainer_arguments


def test_no_process_prints_more_of_the_library_than_the_first(models, monkeypatch):
    # Regression: only the others warned, at every step: "Could not determine method to count non-padding tokens".
    words = ["--model_path", str(models("llama")), "--dataset_path", "x.jsonl", "--use_cpu"]
    args = trainer_arguments(read_train(words))
    with program_state_kept():
        quiet_libraries()
        for is_first in (True, False):
            monkeypatch.setattr(TrainingArguments, "should_log", is_first)
            assert args.get_process_log_level() == transformers.utils.logging.ERROR
