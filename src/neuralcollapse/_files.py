"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Names of temporary files that a killed process leaves, in this version and in earlier ones.
TEMPORARY = re.compile(
    r"\..+\.(ya?ml|csv|parquet|md|tex|html?|png|pdf|svg|ckpt|safetensors)(\.\d+)?\.partial|\..+\.safetensors\.\d+"
)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, sync it to disk and rename it.

    If the process is killed, the disk is full or power is lost, either the old or the new file remains. A symbolic link
    is replaced, not followed.

    Args:
        path: The file; its folder is created if it does not exist.
        write: Function that writes the content to a given path.

    Raises:
        OSError: if the file cannot be written; an existing file is then left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a symbolic link would be followed
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises another exception
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from None
        if isinstance(cause, OSError):
            reason = cause.strerror or str(cause)
            raise OSError(f"{str(path)!r} cannot be written: {reason}; the previous content is unchanged") from error
        raise
