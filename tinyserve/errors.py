"""Every error that tinyserve raises on purpose.

::

    TinyserveError            exit code 1
     ├─ UsageError                      2   an argument that cannot be used
     ├─ ImageError                      1   one input that is no usable image
     ├─ DataError                       1   a data set that cannot be read
     ├─ OutputError                     1   results that cannot be written
     ├─ ModelFileError                  1   a model that is missing, damaged or not ours
     ├─ CheckpointError                 1   a training run that cannot be read
     ├─ RequestError                    1   a request over HTTP that cannot be served
     ├─ BusyError                       1   a full queue
     ├─ GateError                       4   an accuracy or parity gate failed
     └─ DeviceError                     5   the device asked for cannot run

The message is one line that says what is wrong and, where that is known, what to do. Programs turn
an error into its words and its exit code once, at the top.
"""

import functools


class TinyserveError(Exception):
    """Base of all; catch this to catch everything that tinyserve raises on purpose."""

    exit_code = 1


class UsageError(TinyserveError):
    exit_code = 2


class ImageError(TinyserveError):
    pass


class DataError(TinyserveError):
    pass


class OutputError(TinyserveError):
    pass


class ModelFileError(TinyserveError):
    pass


class CheckpointError(TinyserveError):
    pass


class RequestError(TinyserveError):
    """``status`` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:  # pickle would give __init__ the message alone
        return type(self), (self.status, str(self))


class BusyError(TinyserveError):
    """``retry_after``: in how many seconds it is worth another try."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(type(self), retry_after=self.retry_after), (str(self),)


class GateError(TinyserveError):
    exit_code = 4


class DeviceError(TinyserveError):
    exit_code = 5


def check_at_least_one(name: str, value: int | None) -> None:
    """Raise :class:`UsageError` for an argument of less than 1; None stands for its default."""
    if value is not None and value < 1:
        raise UsageError(f"{name} must be at least 1, not {value}")


def first_line(error: BaseException) -> str:
    """What an error of other software says, without the stack that some add to it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def last_line(error: BaseException) -> str:
    """The same, of software that tells how it got there first."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def os_reason(error: OSError) -> str:
    """What the system says."""
    return error.strerror or first_line(error)


def describe_os_error(error: OSError) -> str:
    """What the system says, and of which file where it knows."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{os_reason(error)}"
