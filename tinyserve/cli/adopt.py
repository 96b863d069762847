"""``tinyserve adopt``: a model file of somebody else's network."""

import argparse
import sys
from pathlib import Path

from tinyserve.cli.arguments import Commands, count, number
from tinyserve.errors import UsageError


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "adopt",
        help="make a model file of any image classifier in ONNX",
        description="Wrap an ONNX classifier that takes normalised images, float [batch, 3, N, N], "
        "so that everything here can serve it: preprocessing and softmax go into its graph.",
    )
    command.set_defaults(command=adopt)
    add = command.add_argument
    add("source", metavar="MODEL.onnx", help="somebody else's network")
    add("--labels", metavar="FILE", required=True, help="a class a line, in the output's order")
    for name, of, numbers in (
        ("--mean", "what is taken from pixels", _three_numbers),
        ("--std", "what they are then divided by", _three_deviations),
    ):
        add(name, type=numbers, metavar="R,G,B", required=True, help=f"{of}, in units of 0..1")
    add("--size", type=count, metavar="N", required=True, help="side of the images, in pixels")
    add("-o", "--output", metavar="OUT.onnx", required=True, help="model file to write")


def adopt(arguments: argparse.Namespace) -> int:
    from tinyserve.adopt import adopt as adopt_model
    from tinyserve.adopt import read_labels

    output = Path(arguments.output)
    if output.suffix.lower() != ".onnx" and not output.is_dir():  # the labels, say
        raise UsageError(f"{output} is no name for a model file: it ends in .onnx")
    card = adopt_model(
        Path(arguments.source),
        output,
        labels=read_labels(Path(arguments.labels)),
        mean=arguments.mean,
        std=arguments.std,
        size=arguments.size,
    )
    print(output)
    (entry,) = card.evidence
    print(
        f"largest difference of a probability from {entry.reference}: {entry.max_difference:.1e}, "
        f"batches of {', '.join(map(str, entry.batch_sizes))}",
        file=sys.stderr,
    )
    return 0


def _three_numbers(text: str) -> list[float]:
    numbers = [number(part) for part in text.split(",")]
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError("must be three numbers, separated by commas")
    # Those of pixels from 0 to 255, or what is not finite, no check of the file would notice.
    if not all(-1 <= value <= 1 for value in numbers):
        raise argparse.ArgumentTypeError("must be of pixels from 0 to 1: divide them by 255")
    return numbers


def _three_deviations(text: str) -> list[float]:
    numbers = _three_numbers(text)
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return numbers
