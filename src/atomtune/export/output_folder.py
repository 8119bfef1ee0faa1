"""Output folder: files of `merge` and `export` appear in it when all are written and checked, or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from atomtune.disk import disk_failed, disk_reason, is_without_temporary_folder
from atomtune.errors import AtomtuneError, BadSettings, RunFailed
from atomtune.folders import filled

#: Last sentence of the message of a failed check.
NOT_KEPT = "The merged model is not kept."


@contextlib.contextmanager
def filling(out: Path, *, last: str) -> Iterator[Path]:
    """Yield a folder to write in; its files move to --output_dir when the block ends.

    Raises BadSettings if --output_dir cannot be used, RunFailed if the disk fails.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(filled(out, last=last))
        except BlockingIOError:
            problem = f"--output_dir {out}: another command is writing there now. Pass another one."
            raise BadSettings([problem]) from None
        except OSError as error:
            if disk_failed(error):
                raise
            problem = f"--output_dir {out} cannot be made: {error.strerror}: {error.filename}. Pass another one."
            raise BadSettings([problem]) from None
        try:
            yield folder
        except AtomtuneError:
            raise
        except Exception as error:
            if not disk_failed(error) or is_without_temporary_folder(error):
                raise
            reason = disk_reason(error, out)
            raise RunFailed(
                f"--output_dir {out}: the disk is full or failing: {reason}.\nFree some space there, or pass an "
                "--output_dir on another disk."
            ) from None
