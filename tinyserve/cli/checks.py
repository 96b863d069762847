"""``tinyserve verify`` and ``compare``: is a file what it was, and which of two is better."""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from tinyserve.classifier import Classifier
from tinyserve.cli.arguments import (
    Commands,
    add_device,
    add_json,
    add_model,
    count,
    model_name,
)
from tinyserve.cli.terminal import SOME_FAILED, print_columns, progress
from tinyserve.dataset import find_inputs
from tinyserve.devices import device_name


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "verify",
        help="check that a model file does here what was measured when it was made",
        description="Check that a model file is unchanged and answers as it should. Without "
        "--data: whether its graph and metadata are as they were exported, and its golden images "
        "get the answers that it carries; with it, its accuracy, too. Exit code 4 where they do "
        "not.",
    )
    command.set_defaults(command=verify)
    add = command.add_argument
    add_model(command)
    add("--data", metavar="DIR", help="the validation images that its accuracy was measured on")
    add_device(command)
    add_json(command)

    command = commands.add_parser(
        "compare",
        help="compare two models on the same images: accuracy, agreement, speed",
        description="Compare two models on the same labelled images: the accuracy of each, how "
        "often they agree, how likely such a difference is by chance, and their speed. Exit code 3 "
        "where some images cannot be read.",
    )
    command.set_defaults(command=compare)
    add = command.add_argument
    add_model(command, "a")
    add_model(command, "b")
    add("--data", metavar="DIR", required=True, help="labelled images, or a data set with val/")
    add(
        "-b",
        "--batch-size",
        type=count,
        default=32,
        metavar="N",
        help="images computed at a time (default: %(default)s)",
    )
    add_device(command)
    add_json(command)


def verify(arguments: argparse.Namespace) -> int:
    from tinyserve import verify as verification

    classifier = Classifier(arguments.model, device=arguments.device, self_test=False)
    name = classifier.engine.path.stem
    test = verification.self_test(classifier)
    document: dict[str, Any] = {"model": name, "self_test": dataclasses.asdict(test)}
    device = device_name(test.provider)
    lines = [f"{name}: graph and metadata are as they were exported"]
    if test.max_difference is None:
        lines.append("it carries no golden images")
    else:
        lines.append(
            f"{test.golden_images} golden images on {device}: largest difference of a probability "
            f"{test.max_difference:.1e}, {test.tolerance:g} allowed"
        )
    if arguments.data is not None:
        inputs = list(find_inputs([_validation_folder(arguments.data)]))
        with progress(len(inputs)) as advance:
            found = verification.replay(classifier, inputs, lambda _: advance())
        document["replay"] = {**dataclasses.asdict(found), "difference": found.difference}
        relation = "as many as"
        if found.difference:
            relation = f"{abs(found.difference)} {'more' if found.difference > 0 else 'fewer'} than"
        lines.append(
            f"top-1 {100 * found.correct_top1 / found.images:.2f} % "
            f"({found.correct_top1:,} of {found.images:,}) on {device}, {relation} on "
            f"{device_name(found.expected_provider)} when it was exported"
        )
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(lines))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from tinyserve import compare as comparison

    names = (arguments.a, arguments.b)
    a, b = (Classifier(name, device=arguments.device) for name in names)
    inputs = list(find_inputs([_validation_folder(arguments.data)]))
    with progress(len(inputs)) as advance:
        found = comparison.compare(a, b, inputs, batch_size=arguments.batch_size, watch=advance)
    if found.unreadable:
        print(f"tinyserve: {found.unreadable:,} images cannot be read", file=sys.stderr)
    code = SOME_FAILED if found.unreadable else 0
    if arguments.json:
        print(json.dumps({"models": names, **dataclasses.asdict(found)}, indent=2))
        return code
    sides = (found.a, found.b)
    print_columns(
        [
            ("", *(f"{letter}: {model_name(n)}" for letter, n in zip("AB", names, strict=True))),
            ("top-1", *(f"{100 * side.top1:.2f} %" for side in sides)),
            ("right", *(f"{side.correct:,} of {found.images:,}" for side in sides)),
            ("only this one right", f"{found.only_a_right:,}", f"{found.only_b_right:,}"),
            ("images/s", *(f"{side.images_per_second:,.0f}" for side in sides)),
            ("device", *(device_name(side.provider) for side in sides)),
        ]
    )
    print(
        f"the same top-1 on {100 * found.agreement:.2f} %; p = {found.p_value:.2g} "
        f"(McNemar, exact); B is {found.speed_ratio:.2f} times as fast as A"
    )
    return code


def _validation_folder(data: str) -> str:
    """``val/`` of a data set, or the folder itself."""
    inside = os.path.join(data, "val")
    return inside if os.path.isdir(inside) else data
