"""Extras: packages that only some commands need, and the command that installs them."""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires

from atomtune.errors import BadSettings


def refuse_missing_packages(modules: Sequence[str], *, extra: str, what: str, otherwise: str = "") -> None:
    """Raise BadSettings if a module that `what` needs is not installed.

    extra      the list in pyproject.toml with its package
    otherwise  a flag that makes it unnecessary, for example `--no_generate`
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        way_without = f"   (or pass {otherwise})" if otherwise else ""
        raise BadSettings(
            [f"{what} needs {', '.join(missing)}, not installed here.\n  {install_command(extra)}{way_without}"]
        )


def install_command(extra: str) -> str:
    """The command that installs an extra's packages, by their own names: atomtune itself may not be on the index."""
    try:
        requirements = requires("atomtune") or []
    except PackageNotFoundError:  # run from its source, not installed
        requirements = []
    packages = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        if marker.strip() in (f'extra == "{extra}"', f"extra == '{extra}'"):
            packages.append(f"'{package.strip()}'")
    return f"pip install {' '.join(packages)}" if packages else f"pip install 'atomtune[{extra}]'"
