"""Classify the pictures below a folder with a Hugging Face pipeline over optimum's ONNX Runtime
model; prints one JSON line. ``--model`` is a folder that hf_export.py wrote.

By default as ``pipeline`` is called in its documentation: one image at a time.
"""

import argparse
import csv
import json
import logging
import time
from pathlib import Path

from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("-b", "--batch-size", type=int, default=1)
parser.add_argument("-j", "--workers", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="the image processor over torchvision")
arguments = parser.parse_args()

logging.disable(logging.WARNING)
classify = pipeline(
    "image-classification",
    model=ORTModelForImageClassification.from_pretrained(arguments.model),
    image_processor=AutoImageProcessor.from_pretrained(arguments.model, use_fast=arguments.fast),
    batch_size=arguments.batch_size,
    num_workers=arguments.workers,
)
paths = sorted(str(path) for path in arguments.folder.rglob("*.*"))
classify(paths[:1])
began = time.perf_counter()
found = classify(paths)
with arguments.rows.open("w", newline="") as file:
    csv.writer(file).writerows(
        [
            Path(path).name,
            *(entry["label"] for entry in best),
            *(entry["score"] for entry in best),
        ]
        for path, best in zip(paths, found, strict=True)
    )
seconds = time.perf_counter() - began
print(json.dumps({"images": len(paths), "images_per_second": len(paths) / seconds}))
