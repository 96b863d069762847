"""tinyserve: small image classifiers, served from one self-describing ONNX file."""
