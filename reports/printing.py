"""Text to a terminal, a file or a pipe, whatever encoding that has and whether or not anybody reads to the end."""

from __future__ import annotations

import os
import sys

from fixtures.core.errors import UserError


def printed(text: str) -> None:
    """Print ``text`` as UTF-8; who reads no further, as ``head`` does, has read enough.

    Raises:
        UserError: when it cannot be printed, as on a full disk.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode(errors="backslashreplace"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # Python's own flush at exit must not meet the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"cannot print: {error.strerror or error}") from error
