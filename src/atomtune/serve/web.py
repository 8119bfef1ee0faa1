"""Web: talk to a tuned model and its base on a web page."""

import os
from typing import TYPE_CHECKING

from atomtune.console import Console
from atomtune.engines.server_process import address_problems
from atomtune.errors import BadSettings
from atomtune.extras import refuse_missing_packages
from atomtune.language import message
from atomtune.serve.address import only_this_machine, own_address
from atomtune.serve.tuned_model import load_tuned
from atomtune.settings.command_settings import WebSettings

if TYPE_CHECKING:
    from atomtune.serve.page import Page

#: The user name that goes with --password.
USER = "atomtune"


def web(settings: WebSettings) -> int:
    """Run `atomtune web` until Ctrl-C."""
    refuse_missing_packages(["gradio"], extra="web", what="atomtune web")
    password = settings.password or os.environ.get("ATOMTUNE_PASSWORD")
    _refuse(settings, password)
    console = Console()
    tuned = load_tuned(settings, console)
    from atomtune.serve.page import Page

    page = Page(tuned, settings)
    address = f"http://{own_address(settings.host)}:{settings.port}"
    try:
        _launch(page, settings, password)
        console.say(f"\nready: {address}  Ctrl-C stops it.")
        if password:
            console.say(f"The page asks for the user name {USER} and the password.")
        page.wait(opens=address if settings.open else None)
    except KeyboardInterrupt:
        console.say(message("\nstopped."))
    finally:
        page.close()
    return 0


def _launch(page: "Page", settings: WebSettings, password: str | None) -> None:
    """Start to listen. Raises BadSettings if another program took the port while the model was loaded."""
    try:
        page.launch(host=settings.host, port=settings.port, login=(USER, password) if password else None)
    except OSError:  # Gradio's error has no errno
        if problems := address_problems(settings.host, settings.port):
            raise BadSettings(problems) from None
        raise


def _refuse(settings: WebSettings, password: str | None) -> None:
    """Raise BadSettings with all problems, before anything is loaded."""
    problems = []
    if not only_this_machine(settings.host) and not password:
        problems.append(
            f"--host {settings.host}: other machines could use the model. Pass --password, or set ATOMTUNE_PASSWORD."
        )
    problems += address_problems(settings.host, settings.port)
    if problems:
        raise BadSettings(problems)
