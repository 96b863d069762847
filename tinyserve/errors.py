"""Every error that tinyserve raises on purpose.

::

    TinyserveError            exit code 1
     ├─ UsageError                      2   an argument that cannot be used
     ├─ ImageError                      1   one input that is no usable image
     ├─ DataError                       1   a data set that cannot be read
     ├─ OutputError                     1   results that cannot be written
     ├─ ModelFileError                  1   a model that is missing, damaged or not ours
     ├─ CheckpointError                 1   a training run that cannot be read
     ├─ GateError                       4   an accuracy or parity gate failed
     └─ DeviceError                     5   the device asked for cannot run

The message is one line that says what is wrong and, where that is known, what to do. Programs turn
an error into its words and its exit code once, at the top.
"""


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


class GateError(TinyserveError):
    exit_code = 4


class DeviceError(TinyserveError):
    exit_code = 5
