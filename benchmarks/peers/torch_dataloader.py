"""Classify the pictures below a folder as a plain PyTorch script does; prints one JSON line.

By default in single precision; ``--fast`` is channels last and bfloat16 autocast.
"""

import argparse
from pathlib import Path

import torch
from network import load, run
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("-b", "--batch-size", type=int, default=64)
parser.add_argument("-j", "--workers", type=int, default=2)
parser.add_argument("--fast", action="store_true")
arguments = parser.parse_args()

network = load(arguments.model)
transform = transforms.Compose(
    [
        transforms.Resize(round(network.size / network.crop)),
        transforms.CenterCrop(network.size),
        transforms.ToTensor(),
        transforms.Normalize(network.mean, network.std),
    ]
)
dataset = ImageFolder(str(arguments.folder), transform)
loader = DataLoader(dataset, batch_size=arguments.batch_size, num_workers=arguments.workers)
layout = torch.channels_last if arguments.fast else torch.contiguous_format
model = network.module.eval().to(memory_format=layout)


def classify(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.fast):
        logits = model(images.to(memory_format=layout))
    return logits.float().softmax(dim=1).topk(5)


first = torch.zeros(arguments.batch_size, 3, network.size, network.size)
run(classify, loader, [Path(path).name for path, _ in dataset.samples], arguments.rows, first)
