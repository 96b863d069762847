"""Classify the pictures below a folder as timm's inference.py does; prints one JSON line.

That script is not in timm's wheel and builds timm's own networks; here, what it is made of,
``create_dataset`` and ``create_loader`` with its defaults, feeds the network of a model file.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from network import load, run
from timm.data import create_dataset, create_loader

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("-b", "--batch-size", type=int, default=256)
parser.add_argument("-j", "--workers", type=int, default=2)
parser.add_argument("--amp", action="store_true", help="bfloat16")
parser.add_argument("--channels-last", action="store_true")
arguments = parser.parse_args()

network = load(arguments.model)
dataset = create_dataset("", root=str(arguments.folder))
loader = create_loader(
    dataset,
    input_size=(3, network.size, network.size),
    batch_size=arguments.batch_size,
    use_prefetcher=True,
    num_workers=arguments.workers,
    device=torch.device("cpu"),
    interpolation="bilinear",
    mean=network.mean,
    std=network.std,
    crop_pct=network.crop,
)
model = network.module.eval()
if arguments.channels_last:
    model = model.to(memory_format=torch.channels_last)


def classify(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16) if arguments.amp else nullcontext():
        logits = model(images)
    return logits.float().softmax(dim=1).topk(5)


first = torch.zeros(arguments.batch_size, 3, network.size, network.size)
run(classify, loader, dataset.filenames(basename=True), arguments.rows, first)
