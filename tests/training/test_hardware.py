import subprocess
import sys

import pytest
import torch

from tinyserve.errors import DeviceError, UsageError
from training import hardware

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

PAGE_FAULTS = """
import resource, sys, torch
from training import hardware
if sys.argv[1] == "keep":
    hardware.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    if step == 10:
        before = faults()
    torch.ones(50, 1000, 1000), torch.ones(1000, 1000)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_used_again_and_not_mapped_anew():
    faults = {}
    for mode in ("keep", "default"):
        command = [sys.executable, "-c", PAGE_FAULTS, mode]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[mode] = int(run.stdout)
    # Ten times 200 MB in pages of 4 KiB are half a million.
    assert faults["default"] > 100_000
    assert faults["keep"] < faults["default"] / 100


@without_gpu
def test_a_gpu_that_is_not_there_is_refused():
    assert hardware.device("auto") == CPU
    with pytest.raises(DeviceError):
        hardware.device("cuda")


def test_precision_is_chosen_by_what_the_device_has():
    assert hardware.precision("auto", CPU) in ("fp32", "bf16")
    assert hardware.precision("auto", torch.device("cuda")) == "fp16"
    assert hardware.precision("bf16", CPU) == "bf16"
    with pytest.raises(UsageError, match="needs a GPU"):
        hardware.precision("fp16", CPU)


def test_the_machine_is_described():
    assert hardware.cpu_model()
    assert hardware.peak_memory(CPU) > 50_000_000
    assert "CPU threads" in hardware.name_of(CPU)
