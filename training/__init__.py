import sys
from types import TracebackType

import tinyserve  # noqa: F401  first of all: it keeps ONNX Runtime from calling home


def _in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, ModuleNotFoundError):
        print(f"{error}; training needs: pip install -e '.[training]'", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # as it is while Python looks for the module in `python -m training.fit`
    sys.excepthook = _in_one_line
