"""What a failed command says: one sentence for what the user can mend, a traceback for a fault of ours."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback

from lwcompile.cli.console import err
from lwcompile.errors import InternalError, LwError

STOPPED = 130
INTERNAL = 70
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust libraries report one


class Stopped(BaseException):
    """The user pressed Ctrl-C."""


def report_failure(error: BaseException) -> int:
    """Print what went wrong to stderr; the exit code."""
    if isinstance(error, Stopped):
        err().print("stopped; run the same command again to go on", style="yellow", markup=False)
        return STOPPED
    if isinstance(error, LwError) and not isinstance(error, InternalError):
        return _say(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if (sentence := system_failure(error)) is not None:
        return _say(sentence, LwError.exit_code)
    err().print("".join(traceback.format_exception(error)), markup=False, highlight=False, soft_wrap=True)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return _say(f"internal error: {type(error).__name__}: {reason}; this is a fault of lwcompile, please report it", INTERNAL)


def _say(sentence: str, code: int) -> int:
    err().print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def system_failure(error: BaseException) -> str | None:
    """One sentence for what the machine refused: space, permission, memory. None for anything else."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the memory is full; close other programs, or give fewer or shorter samples (--samples, --seqlen)"
    found = error.errno if isinstance(error, OSError) else None
    if found is None and (match := _OS_ERROR.search(str(error))):
        found = int(match.group(1))
    if found is None and "No space left on device" in str(error):
        found = errno.ENOSPC
    if found is None:
        return None
    place = getattr(error, "filename", None)
    what = f" {place}" if place else ""
    if found in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing{what}; free some space and run the same command again: finished steps are kept"
    if found in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for{what or ' a file'}; name another directory"
    if found == errno.ENOENT:
        return f"{place or 'a file'} does not exist; check the path"
    if found in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"{place or 'a path'}: {os.strerror(found).lower()}; name another path"
    return f"{place}: {os.strerror(found).lower()}; check the path" if place else None
