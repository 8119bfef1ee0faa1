"""Inspect: the command, which reports what of a data set is learned and its problems, without loading a model."""

from dataclasses import replace
from pathlib import Path

from atomtune.batch.cost import sample_rows
from atomtune.console import Console, as_command, print_json
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.formats.schema import THINKING
from atomtune.data.ledger import about_broken, refuse_unusable
from atomtune.data.reading.sources import distinct_names
from atomtune.data.records import Record
from atomtune.errors import BadSettings
from atomtune.inspect.allowances import allowances, require
from atomtune.inspect.html_page import write_page
from atomtune.inspect.modes import examples_by_mode
from atomtune.inspect.report import Report, build_report
from atomtune.inspect.terminal import say_report
from atomtune.inspect.tokens import TokenDecoder, show
from atomtune.language import translated
from atomtune.model.base_shape import base_shape
from atomtune.model.load import load_tokenizer, quiet_libraries
from atomtune.settings.command_settings import InspectSettings
from atomtune.settings.run_settings import RecordSettings, TokenizerSettings
from atomtune.settings.spelled import words_of

#: Tokens shown of each mode: the modes differ at the end of the prompt.
_SHOWN_OF_A_MODE = 120


def inspect(settings: InspectSettings) -> int:
    """Report on the records; returns exit code 0.

    Raises BadSettings for a wrong setting; BadData if a source cannot be read and, after the report, if no record can
    be used; CheckFailed if more is found than --fail_on allows.
    """
    console = Console(stderr=settings.json)
    report = examine(settings, console)
    if settings.json:
        print_json(report.ledger.to_run_json())
    tell(report, settings, console)
    refuse_unusable(report.ledger, report.sources)
    if report.ledger.broken and not settings.skip_bad:
        console.notice(about_broken(report.ledger))
        settings = replace(settings, skip_bad=True)
    if not settings.json:
        of_the_run = words_of(settings, TokenizerSettings, RecordSettings, also=["per_device_train_batch_size"])
        console.next_steps([as_command(["train", *of_the_run])])
    return 0


def examine(settings: InspectSettings, console: Console) -> Report:
    """Read the records as a run would, and run all checks.

    Raises BadSettings for a wrong setting, BadData for a source that cannot be read.
    """
    if settings.html and Path(settings.html).is_dir():
        raise BadSettings([f"--html {settings.html}: a folder; expected the name of a file, for example report.html."])
    allowances(settings.fail_on)
    quiet_libraries()
    tokenizer = load_tokenizer(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    template = load_template(settings.template, tokenizer, **settings.template_options())
    shape = base_shape(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    if settings.max_seq_length is None:
        settings = replace(settings, max_seq_length=shape.longest)
    return build_report(settings, template, console, most_tokens=shape.longest)


def tell(report: Report, settings: InspectSettings, console: Console) -> None:
    """Print the report and some records, and write the page. Raises CheckFailed if more is found than allowed."""
    decoder = TokenDecoder(report.template.tokenizer)
    say_report(report, console)
    if settings.samples and len(report.stored) and not console.quiet:
        _say_samples(report, settings, console, decoder)
    if settings.html:
        write_page(report, Path(settings.html), decoder, seed=settings.seed)
        console.say(translated(f"\nwritten: {settings.html}"))
    require(allowances(settings.fail_on), report.findings, report.ledger)


def _say_samples(report: Report, settings: InspectSettings, console: Console, decoder: TokenDecoder) -> None:
    template = report.template
    chosen = sample_rows(len(report.stored), settings.samples, seed=settings.seed)
    show(console, [example for row in chosen for example in report.examples(row)], decoder)
    modes = examples_by_mode(template, _record_of(report, settings, chosen[0])) if THINKING in template.source else ()
    if modes:
        console.say(
            f"\nThe template has two modes. The last answer of {report.origin(chosen[0])} in each, as "
            f"--chat_template_kwargs '{{\"{THINKING}\": …}}' or a record's own {THINKING} chooses:"
        )
        show(console, modes, decoder, part=_SHOWN_OF_A_MODE)


def _record_of(report: Report, settings: InspectSettings, row: int) -> Record:
    """The record of a stored row, read again from its source. Raises BadData if that has changed."""
    rules = Rules(**replace(settings, max_seq_length=report.max_tokens).rules())
    number = 0
    while row >= len(report.parts[number]):
        row -= len(report.parts[number])
        number += 1
    name = distinct_names(report.sources)[number]
    return next(records_of(report.sources[number], rules, report.parts[number].select([row]), name=name))
