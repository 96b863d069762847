"""The arguments that several commands take: how they are declared, and what they stand for."""

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from tinyserve.devices import DEVICES

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model(command: argparse.ArgumentParser, name: str = "model") -> None:
    command.add_argument(name, metavar=name.upper(), help="name or .onnx file")


def add_models(command: argparse.ArgumentParser, more: str, *, required: bool = False) -> None:
    """``more`` is what the help says of them besides."""
    command.add_argument(
        "-m",
        "--model",
        action="extend",
        type=_models,
        required=required,
        help=f"name or .onnx file, or several with commas; may be repeated{more}",
    )


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print what was found as JSON")


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from error


def count(text: str) -> int:
    found = whole(text)
    if found < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return found


def port(text: str, least: int = 0) -> int:
    """0 stands for any that is free."""
    found = whole(text)
    if not least <= found <= 65_535:
        raise argparse.ArgumentTypeError(f"must be from {least} to 65535")
    return found


def positive(text: str) -> float:
    found = number(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return found


def _models(text: str) -> list[str]:
    return [text] if Path(text).is_file() else text.split(",")  # a path may have commas


def model_name(model: str) -> str:
    return Path(model).name.removesuffix(".onnx")
