"""Which devices there are, on machines of several kinds."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinyserve import devices
from tinyserve.devices import cpu_quota, default_threads, device_name, preferred_precisions
from tinyserve.engine import Engine
from tinyserve.errors import UsageError
from tinyserve.modelfile import find_model


def test_the_device_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TINYSERVE_DEVICE", "gpu")
    with pytest.raises(UsageError, match=r"unknown device 'gpu' \(known: auto, cpu, cuda, "):
        Engine(find_model("inception"))


def test_precisions_suit_the_device():
    assert preferred_precisions("cuda")[0] == preferred_precisions("tensorrt")[0] == "fp16"
    assert preferred_precisions("cpu")[0] == preferred_precisions("openvino")[0] == "int8"


def test_devices_have_names():
    providers = ["CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINO"]
    assert [device_name(p) for p in providers] == ["CPU", "CUDA", "OpenVINO"]
    assert device_name("TensorrtExecutionProvider") == "TensorRT"


def test_threads_follow_the_affinity_mask_and_the_environment(monkeypatch):
    monkeypatch.delenv("TINYSERVE_NUM_THREADS", raising=False)
    one = min(os.sched_getaffinity(0))
    code = "from tinyserve.devices import default_threads; print(default_threads())"
    pinned = ["taskset", "-c", str(one), sys.executable, "-c", code]
    assert subprocess.check_output(pinned, text=True).strip() == "1"
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("TINYSERVE_NUM_THREADS", "3")
    assert default_threads() == 3
    for value in ("many", "0", "-1", "3000000000"):
        monkeypatch.setenv("TINYSERVE_NUM_THREADS", value)
        with pytest.raises(UsageError, match="TINYSERVE_NUM_THREADS"):
            default_threads()


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        # systemd's CPUQuota= of a service, and of the slice around it
        ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "200000 100000"}, 2),
        (
            "0::/a.slice/b.service\n",
            {
                "cpu.max": "800000 100000",
                "a.slice/cpu.max": "300000 100000",
                "a.slice/b.service/cpu.max": "max 100000",
                "c.slice/cpu.max": "100000 100000",
            },
            3,
        ),
        # cgroup v1, where other controllers have groups of their own
        (
            "3:memory:/a\n2:cpu,cpuacct:/b\n1:name=systemd:/c\n0::/\n",
            {"cpu/b/cpu.cfs_quota_us": "50000", "cpu/b/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # a container, which does not see what is around it, but its name there
        ("0::/docker/1f\n", {"cpu.max": "250000 100000"}, 2.5),
        (
            "2:cpu,cpuacct:/docker/1f\n",
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            4,
        ),
        (None, {}, None),
    ],
)
def test_the_least_quota_of_all_groups_around_a_process_holds(tmp_path, groups, files, cores):
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == cores


def test_threads_that_look_for_cuda_at_once_leave_stdout_as_it_was(monkeypatch):
    """A thread would put back what another had put in its place."""
    calls, second, first_is_over = [], threading.Event(), threading.Event()

    def preload() -> None:
        calls.append(None)
        if len(calls) == 1:
            second.wait(0.5)  # for which it has to wait in vain
        else:
            second.set()
            first_is_over.wait(60)

    monkeypatch.setattr(devices, "driver_problem", lambda: None)
    monkeypatch.setattr(devices.ort, "preload_dlls", preload)
    before = sys.stdout
    threads = [threading.Thread(target=devices.cuda_problem.__wrapped__) for _ in range(2)]
    for thread in threads:
        thread.start()
    while threads[0].is_alive() and threads[1].is_alive():
        time.sleep(0.01)
    first_is_over.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert sys.stdout is before


def run_on(driver: Path, device: str) -> subprocess.CompletedProcess:
    """The command line on a machine with that driver."""
    command = [sys.executable, "-m", "tinyserve.cli", "verify", "inception", "--device", device]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="the library is found otherwise")
@pytest.mark.parametrize(
    ("init", "gpus", "said"),
    [
        (999, 1, "the NVIDIA driver does not start (cuInit: error 999)"),
        (0, 0, "the NVIDIA driver finds no GPU"),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_driver_of_no_use_is_exit_code_5_with_the_reason(nvidia_driver, device, init, gpus, said):
    run = run_on(nvidia_driver(init=init, gpus=gpus), device)
    assert run.returncode == 5
    assert run.stderr == f"tinyserve: device {device} cannot run: {said}\n"


def test_the_library_that_cuda_lacks_is_named(nvidia_driver):
    packages = importlib.util.find_spec("nvidia")
    folders = [] if packages is None else packages.submodule_search_locations
    if any(any(Path(folder).rglob("libcurand.so*")) for folder in folders):
        pytest.skip("CUDA's libraries are installed as Python packages")
    driver = nvidia_driver(init=0, gpus=1)
    said = r"lib\w+\.so\.\d+ cannot be loaded \(pip install 'tinyserve\[cuda\]'\)"
    run = run_on(driver, "cuda")
    assert run.returncode == 5
    assert re.search(f"device cuda cannot run: {said}\n$", run.stderr)
    run = run_on(driver, "auto")
    assert run.returncode == 0
    assert re.search(f"running on the CPU: {said}\n", run.stderr)
    assert run.stdout.startswith("inception")  # where ONNX Runtime prints what it does not find
