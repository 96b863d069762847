"""tinyserve: small image classifiers, served from one self-describing ONNX file.

::

    from tinyserve import Classifier

    for prediction in Classifier("resnet20").classify("samples/goldfish/val_6257.JPEG"):
        print(f"{prediction.name}: {prediction.probability:.1%}")
"""

from tinyserve.classifier import Classifier, Prediction, Result
from tinyserve.errors import TinyserveError

__all__ = ["Classifier", "Prediction", "Result", "TinyserveError"]
