"""Completion: words that the Tab key offers in a shell, from the same names and choices as --help.

argcomplete runs the program itself, so nothing generated can become outdated, and it supports bash, zsh and fish.
It is turned on by `eval "$(register-python-argcomplete atomtune)"`.
"""

import argparse
from collections.abc import Mapping

import argcomplete

from atomtune.language import LANGUAGES
from atomtune.settings.flags import OF_A_RUN, PATHS_ARE, arity, flag_of, types_of
from atomtune.settings.help import choices_of_setting
from atomtune.settings.library import library_types
from atomtune.settings.read import GROUPS


def complete(summaries: Mapping[str, str]) -> None:
    """Answer the shell and end the process. summaries: command → its line in the overview."""
    program = argparse.ArgumentParser(prog="atomtune", add_help=False)
    commands = program.add_subparsers()
    for command, summary in summaries.items():
        parser = commands.add_parser(command, help=summary, add_help=False)
        parser.add_argument("--help", nargs="?", choices=["all", "json"])
        parser.add_argument("--language", choices=LANGUAGES)
        if command in OF_A_RUN or command in PATHS_ARE:
            parser.add_argument("files", nargs="*")  # run.yaml, records, or runs
        library = library_types() if command in OF_A_RUN else {}
        for name, kind in (library | types_of(GROUPS[command])).items():
            parser.add_argument(flag_of(name), choices=choices_of_setting(name, kind) or None, **arity(kind))
    argcomplete.autocomplete(program)
