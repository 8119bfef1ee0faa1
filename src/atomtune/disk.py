"""Disk: a file is written whole or not at all; which errors are the disk's and not a bug."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The write failed for want of space or of a working disk, not by a bug.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def disk_failed(error: BaseException) -> bool:
    """Whether a write failed because of the disk; torch and safetensors say so in words only."""
    said = str(error)
    return getattr(error, "errno", None) in _DISK_ERRORS or "No space left" in said or "file write failed" in said


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write beside the name and rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(values, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk; Windows opens no folders."""
    if os.name == "nt" and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
