"""Resume command: tells a user how to continue a run that ended early."""

from collections.abc import Collection, Iterator, Sequence

from atomtune.console import as_command
from atomtune.settings.declare import is_secret
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.run_context import RunContext

#: Settings that start a run from somewhere else, and contradict --resume.
_STARTS = ("continue_training", "checkpoint", "resume_from_checkpoint")


def how_to_resume(run: RunContext) -> str:
    """How to continue the run: a sentence, with the full command on its own line if it is known."""
    settings, folder = run.settings, run.args.output_dir
    if settings.argv is None:
        return f"The same call with resume=True continues from there (output_dir={folder!r})."
    # The launcher's own command is not known, and a start in a YAML file cannot be taken back with a flag.
    if run.args.world_size > 1 or not all(settings.origins.get(name, "--").startswith("--") for name in _STARTS):
        return f"The same command with --resume{_in_place_of(settings)} continues from there (--output_dir {folder})."
    words = list(_without((*_STARTS, "resume"), settings.argv))
    if "output_dir" not in settings.origins:
        words += ["--output_dir", folder]
    return f"To continue from there:\n  {as_command(['train', *words, '--resume'])}"


def _in_place_of(settings: TrainSettings) -> str:
    """The flags that --resume must replace, because they start the run from somewhere else."""
    if settings.run.continue_training:
        return " in place of --continue_training --checkpoint"
    return " in place of --resume_from_checkpoint" if settings.run.resume_from_checkpoint else ""


def without_start(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command, without secrets and without flags that start the run from somewhere else."""
    return _without(_STARTS, argv)


def _without(names: Collection[str], argv: Sequence[str]) -> Iterator[str]:
    """The words of a command, without secrets and without these flags and their values."""
    is_value_left_out = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        name = flag.replace("-", "_").lstrip("_")
        if word.startswith("--"):
            is_left_out = name in names or is_secret(name)
            is_value_left_out = is_left_out and not equals
        else:
            # A flag has one value: the next word may be run.yaml
            is_left_out, is_value_left_out = is_value_left_out, False
        if not is_left_out:
            yield word
