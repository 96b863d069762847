"""tinyserve: small image classifiers, served from one self-describing ONNX file.

::

    from tinyserve import Classifier

    for prediction in Classifier("resnet20").classify("samples/goldfish/val_68.JPEG"):
        print(f"{prediction.name}: {prediction.probability:.1%}")
"""

import os
from typing import TYPE_CHECKING

# Before ONNX Runtime is imported, which otherwise reports every session to its makers and leaves an
# identifier of the machine in the home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from tinyserve.classifier import Classifier, Prediction, Result
from tinyserve.dataset import find_inputs
from tinyserve.errors import TinyserveError

__all__ = ["Classifier", "Prediction", "Result", "TinyserveError", "find_inputs"]

__version__: str

if not TYPE_CHECKING:  # to type checkers, every name would be there

    def __getattr__(name: str) -> str:
        """``__version__``, "0" in a checkout that is not installed: found only when asked for,
        which takes a while."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata

        try:
            return metadata.version("tinyserve")
        except metadata.PackageNotFoundError:
            return "0"
