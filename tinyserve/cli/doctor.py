"""``tinyserve doctor``: what runs models on this machine."""

import argparse
import dataclasses
import json
import logging

from tinyserve.cli.arguments import Commands, add_json
from tinyserve.cli.terminal import print_columns


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="say what runs models on this machine, and what to do about the rest",
        description="Try every device, and every installed model on the default one. Exit code 5 "
        "where a device or ONNX Runtime has a problem, 4 where only a model has.",
    )
    command.set_defaults(command=doctor)
    add_json(command)


def doctor(arguments: argparse.Namespace) -> int:
    from tinyserve import doctor as diagnosis

    # What a model falls back from is in its row.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)
    found = diagnosis.diagnose()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return found.exit_code
    version = found.tinyserve or "(not installed)"
    print(f"tinyserve {version}, Python {found.python}, {found.platform}")
    marks = {"ok": "ok", "absent": "-", "problem": "PROBLEM"}
    print_columns([(marks[check.status], check.name, check.found) for check in found.checks])
    if found.default_device:
        print(f"models run on {found.default_device} by default")
    else:
        print("models do not run by default")
    return found.exit_code
