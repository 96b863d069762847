"""``tinyserve triton``: a model repository for NVIDIA Triton."""

import argparse
import os
import sys
from pathlib import Path

from tinyserve.classifier import model_file
from tinyserve.cli.arguments import Commands, add_models, model_name
from tinyserve.errors import UsageError


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "triton",
        help="write a model repository for NVIDIA Triton",
        description="Write a model repository for NVIDIA Triton Inference Server: a folder for "
        "each model, with its file, its configuration and its labels.",
    )
    command.set_defaults(command=triton)
    command.add_argument("output", metavar="DIR", help="folder of the repository")
    add_models(command, "", required=True)


def triton(arguments: argparse.Namespace) -> int:
    from tinyserve.triton import write_repository

    models = {model_name(name): model_file(name) for name in arguments.model}
    if len(models) < len(arguments.model):
        raise UsageError("two models of one name")
    for folder in write_repository(Path(arguments.output), models):
        print(folder)
    print(
        f"serve it with: tritonserver --model-repository={os.path.abspath(arguments.output)}",
        file=sys.stderr,
    )
    return 0
