"""The shipped models on all of Tiny ImageNet's validation split. Wants ``TINY_IMAGENET``."""

import json
import os
import subprocess
import sys

import pytest

from tinyserve.engine import read_card
from tinyserve.modelfile import installed_models

# Peak resident memory of a child in KiB, with the child's own exit code.
MEASURED = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(installed_models()))
def test_accuracy_is_what_the_file_says_to_the_image(model, tiny_imagenet, tmp_path):
    card = read_card(installed_models()[model])
    top1, top5 = card.accuracy
    if card.precision == "fp32":  # what the trainer measured
        assert (top1, top5) == (card.training.val_top1, card.training.val_top5)
    summary_path = tmp_path / "summary.json"
    run = subprocess.run(
        [
            sys.executable, "-c", MEASURED, sys.executable, "-m", "tinyserve.cli", "classify",
            str(tiny_imagenet / "val"), "-m", model, "--device", "cpu",
            "-o", str(tmp_path / "rows.jsonl"), "--summary", str(summary_path),
        ],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    summary = json.loads(summary_path.read_text())
    assert summary["inputs"] == summary["labelled"] == card.evidence[0].val_images == 10_000
    assert round(summary["top1"] * 10_000) == round(top1 * 10_000)
    assert round(summary["top5"] * 10_000) == round(top5 * 10_000)
    assert int(run.stdout) <= 600 * 1024
