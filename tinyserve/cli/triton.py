"""``tinyserve triton``: a model repository for NVIDIA Triton."""

import argparse
import os
import sys
from pathlib import Path

from tinyserve.classifier import model_file
from tinyserve.cli.arguments import Commands, model_name
from tinyserve.errors import UsageError


def add_to(commands: Commands) -> None:
    command = commands.add_parser("triton", help="write a model repository for NVIDIA Triton")
    command.set_defaults(command=triton)
    add = command.add_argument
    add("output", metavar="OUT", help="folder of the repository")
    add(
        "-m",
        "--model",
        action="append",
        required=True,
        help="name or .onnx file, or several with commas (may be repeated)",
    )


def triton(arguments: argparse.Namespace) -> int:
    from tinyserve.triton import write_repository

    names = [name for names in arguments.model for name in names.split(",")]
    models = {model_name(name): model_file(name) for name in names}
    if len(models) < len(names):
        raise UsageError("two models of one name")
    for folder in write_repository(Path(arguments.output), models):
        print(folder)
    print(
        f"serve it with: tritonserver --model-repository={os.path.abspath(arguments.output)}",
        file=sys.stderr,
    )
    return 0
