"""Write the network of a model file as Hugging Face's optimum loads it: a folder with model.onnx
(normalised float NCHW to logits), config.json and preprocessor_config.json.

::

    python benchmarks/peers/hf_export.py exported/resnet20.int8.onnx folder/
"""

import json
import sys
from pathlib import Path

import torch
from network import load

model, folder = map(Path, sys.argv[1:])
network = load(model)
folder.mkdir(parents=True, exist_ok=True)
torch.onnx.export(
    network.module.eval(),
    (torch.zeros(2, 3, network.size, network.size),),
    folder / "model.onnx",
    input_names=["pixel_values"],
    output_names=["logits"],
    dynamic_shapes=({0: torch.export.Dim("batch")},),
    dynamo=True,
    external_data=False,
    verbose=False,
)
# What transformers must know of a network is how it is called and how many classes it has.
config = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "id2label": {str(index): str(index) for index in range(network.classes)},
    "label2id": {str(index): index for index in range(network.classes)},
}
preprocessor = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": network.size},
    "crop_pct": network.crop,
    "resample": 2,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": network.mean,
    "image_std": network.std,
}
(folder / "config.json").write_text(json.dumps(config, indent=2))
(folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
