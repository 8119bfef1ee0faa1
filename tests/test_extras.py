"""A missing package is named with a command that installs it, wherever atomtune came from."""

import pytest

from atomtune.errors import BadSettings
from atomtune.extras import install_command, refuse_missing_packages


def test_the_command_names_the_packages_with_their_ranges():
    assert install_command("qlora") == "pip install 'bitsandbytes<1,>=0.49'"


def test_an_extra_unknown_to_the_installed_version_is_named_in_the_command():
    assert install_command("of tomorrow") == "pip install 'atomtune[of tomorrow]'"


def test_missing_packages_are_reported_with_the_setting_that_avoids_them():
    refuse_missing_packages(["json"], extra="evaluate", what="x")
    with pytest.raises(
        BadSettings, match=r"x needs no_such_module, not installed here\.\n  pip install .*--no_generate"
    ):
        refuse_missing_packages(["json", "no_such_module"], extra="evaluate", what="x", otherwise="--no_generate")
