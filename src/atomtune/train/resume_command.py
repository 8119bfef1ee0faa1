"""Resume command: the words with which a user continues a run that ended early."""

from collections.abc import Iterator, Sequence

from atomtune.console import as_command
from atomtune.settings.fields import is_secret
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.run_context import RunContext


def how_to_resume(run: RunContext) -> str:
    """How a user continues, with the command on a line of its own if it is known in full."""
    settings, folder = run.settings, run.args.output_dir
    if settings.argv is None:
        return f"The same call with resume=True continues from there (output_dir={folder!r})."
    if run.args.world_size > 1:  # a launcher's own words stand in front of the command
        return f"The same command with --resume{_in_place_of(settings)} continues from there (--output_dir {folder})."
    words = [word for word in without_start(settings.argv) if word != "--resume"]
    if "output_dir" not in settings.origins:
        words += ["--output_dir", folder]
    return f"To continue from there:\n  {as_command(['train', *words, '--resume'])}"


def _in_place_of(settings: TrainSettings) -> str:
    """--resume does not stand beside what began the run from another place."""
    if settings.run.continue_training:
        return " in place of --continue_training --checkpoint"
    return " in place of --resume_from_checkpoint" if settings.run.resume_from_checkpoint else ""


def without_start(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command without the flags that began the run from another place, and without secrets."""
    is_value_left_out = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        name = flag.replace("-", "_").lstrip("_")
        if word.startswith("--"):
            is_left_out = name in ("continue_training", "checkpoint", "resume_from_checkpoint") or is_secret(name)
            is_value_left_out = is_left_out and not equals
        else:
            is_left_out, is_value_left_out = is_value_left_out, False  # one word: the next may be run.yaml
        if not is_left_out:
            yield word
