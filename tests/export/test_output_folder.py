"""Output folder: filled completely or left as it was; every failure is reported in one sentence."""

import errno

import pytest

from atomtune.errors import BadSettings, CheckFailed, RunFailed
from atomtune.export.output_folder import filling


def test_output_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with filling(out, last="config.json") as folder:
        (folder / "config.json").write_text("{}")
        assert not (out / "config.json").exists()
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckFailed("not equal"), r"^not equal$"),
        (OSError(errno.ENOSPC, "No space left on device"), r"the disk is full or failing: No space left on device\."),
        (ValueError("a bug"), r"^a bug$"),
    ],
)
def test_an_error_leaves_no_folder(tmp_path, error, told):
    out = tmp_path / "out"
    kind = RunFailed if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match=told), filling(out, last="config.json") as folder:
        (folder / "config.json").write_text("{}")
        raise error
    assert not out.exists()


def test_a_folder_that_another_command_fills_is_refused(tmp_path):
    out = tmp_path / "out"
    with filling(out, last="config.json") as folder:
        with pytest.raises(BadSettings, match="another command is writing there now"), filling(out, last="x"):
            pass
        (folder / "config.json").write_text("{}")
    assert (out / "config.json").is_file()
