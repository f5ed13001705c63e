"""A user's mistake, told in one line.

`UserError` is raised wherever input from outside (a setting, a file, a folder, a disk)
is not what the study needs. Its message names the thing, its value, what was expected
and the remedy; `scaling.command.run_main` prints that line and exits with status 2, without a traceback.
Anything else that is raised is a defect of the project and keeps its traceback.
"""

import errno
import math
from collections.abc import Iterable

# Of a file system that does not answer now: its node's or its network's failure, where the same attempt may succeed
# later or elsewhere, not the settings'.
NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)

# A disk's, not a program's: full, over its quota, a file over the limit on its size, read only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(Exception):
    """Bad input, said in one line: the thing, its value, what was expected, the remedy."""


class BadDataError(UserError):
    """Shards, or a share of their clips, that are not what their index promises."""


class UnreachableError(UserError):
    """A file system or another source that did not answer, or not in full, however often it was asked."""


class MeetingError(UserError):
    """The processes of a run did not all meet: not found to be the settings' fault, so a scheduler may try again."""


def refused_write(what: str, errnos: Iterable[int | None], left: str) -> UserError:
    """The error of what could not be written, by what the system said of it: UnreachableError where it did not answer.

    left: what is whole nevertheless
    """
    if any(number in NO_ANSWER for number in errnos):
        return UnreachableError(f"{what}: check the file system and run the same command again; {left}")
    return UserError(f"{what}: make the disk writable and free some space, and run the same command again; {left}")


def require_finite(prefix: str, settings: object) -> None:
    """UserError for a number that is not one, or has no end."""
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}.{name} = {value}: expected a finite number")


def first_line(error: BaseException) -> str:
    """The first line in which an error says anything; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
