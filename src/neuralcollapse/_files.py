"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Names of the temporary files that a killed process leaves: those of this version, and of earlier ones.
TEMPORARY = re.compile(
    r"\..+\.(ya?ml|csv|parquet|md|tex|html?|png|pdf|svg|ckpt|safetensors)(\.\d+)?\.partial|\..+\.safetensors\.\d+"
)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, sync it to disk and rename it.

    A kill, a full disk or a loss of power leaves the former file or the new one. A symbolic link is replaced, not
    followed.

    Args:
        path: The file; its folder is created if it does not exist.
        write: Function that writes the content to the path that it is given.

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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises an error of its own
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from None
        if isinstance(cause, OSError):
            reason = cause.strerror or str(cause)
            raise OSError(f"{str(path)!r} cannot be written: {reason}; what it held before is left") from error
        raise
