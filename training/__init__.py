import tinyserve  # noqa: F401  first of all: it keeps ONNX Runtime from calling home
