"""What runs models on this machine, what does not, and what to do about it."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from tinyserve.devices import (
    cpu_quota,
    default_threads,
    device_name,
    device_problem,
    driver_problem,
    import_openvino,
    usable_cores,
    wanted_device,
)
from tinyserve.engine import Engine
from tinyserve.errors import DeviceError, GateError, TinyserveError, last_line
from tinyserve.modelfile import installed_models, search_folders
from tinyserve.onnxruntime_session import execution_providers, session_options

# y = Relu(x) of one number, as an ONNX file: something that every device can run.
TINY_MODEL = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)

# In the order in which ``auto`` prefers them; TensorRT has to be asked for.
_DEVICES = {"cuda": "CUDA", "openvino": "OpenVINO", "cpu": "CPU", "tensorrt": "TensorRT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at, and what was found. ``absent`` is what need not be there."""

    kind: Literal["runtime", "device", "model"]
    name: str
    status: Literal["ok", "absent", "problem"]
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """``default_device`` is where models run that are not told where: "CUDA", "OpenVINO", "CPU";
    None where that does not work. ``tinyserve`` is the version that is installed, None in a mere
    checkout."""

    tinyserve: str | None
    python: str
    platform: str
    default_device: str | None
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 without problems; else that of an error of the device, or else of a model."""
        kinds = {check.kind for check in self.checks if check.status == "problem"}
        if kinds & {"runtime", "device"} or self.default_device is None:
            return DeviceError.exit_code
        return GateError.exit_code if kinds else 0


def diagnose() -> Diagnosis:
    """Try every device with a tiny model, and every installed model on the default device."""
    wanted = wanted_device(None)
    checks = [_check_onnxruntime()]
    if hasattr(ort, "InferenceSession"):
        checks += [_check_device(device, wanted) for device in _DEVICES]
    works = [check.name for check in checks if check.kind == "device" and check.status == "ok"]
    candidates = ("CUDA", "OpenVINO", "CPU") if wanted == "auto" else (_DEVICES[wanted],)
    default = next((name for name in candidates if name in works), None)
    if default:
        checks += _check_models(default)
    return Diagnosis(
        tinyserve=_version("tinyserve"),
        python=platform.python_version(),
        platform=platform.platform(),
        default_device=default,
        checks=tuple(checks),
    )


def _builds() -> list[str]:
    """Names of the packages whose files are those of the ONNX Runtime imported here. One that lies
    elsewhere on the path does no harm."""
    names = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", [])))
    if ort.__file__ is None:  # its files are lost, and with them where they were
        return names
    imported = Path(ort.__file__).parent.resolve()
    distributions = [importlib.metadata.distribution(name) for name in names]
    return [
        name
        for name, distribution in zip(names, distributions, strict=True)
        if Path(str(distribution.locate_file("onnxruntime"))).resolve() == imported
    ]


def _check_onnxruntime() -> Check:
    """Its builds come in packages that overwrite each other's files."""
    names = _builds()
    builds = [f"{name} {_version(name)}" for name in names]
    kept = "onnxruntime-gpu" if "onnxruntime-gpu" in names else "onnxruntime"
    if len(builds) > 1:
        return Check(
            kind="runtime",
            name="ONNX Runtime",
            status="problem",
            found=f"{' and '.join(builds)} overwrite each other: pip uninstall -y "
            f"{' '.join(names)}, then pip install {kept}",
        )
    if not hasattr(ort, "InferenceSession"):
        return Check(
            kind="runtime",
            name="ONNX Runtime",
            status="problem",
            found=f"{' '.join(builds) or 'what is installed'} has lost its files: "
            f"pip install --force-reinstall --no-deps {kept}",
        )
    return Check(
        kind="runtime",
        name="ONNX Runtime",
        status="ok",
        found=builds[0] if builds else f"{ort.__version__}, not installed by pip",
    )


def _check_device(device: str, wanted: str) -> Check:
    problem = device_problem(device) or _session_problem(device)
    if problem is None:
        status: Literal["ok", "absent", "problem"] = "ok"
    elif device == wanted or (wanted == "auto" and _expected(device)):
        status = "problem"
    else:
        status = "absent"
    return Check(
        kind="device", name=_DEVICES[device], status=status, found=problem or _described(device)
    )


def _expected(device: str) -> bool:
    """Whether the machine or its installation is made for a device, so that it ought to work."""
    if device == "cuda":
        return Path("/dev/nvidiactl").exists() or driver_problem() is None
    if device == "openvino":
        return _version("openvino") is not None
    return device == "cpu"


def _session_problem(device: str) -> str | None:
    """Why a device does not run the tiny model; None if it does."""
    try:
        if device == "openvino":
            core = import_openvino().Core()
            core.compile_model(core.read_model(TINY_MODEL), "CPU")([np.ones(1, np.float32)])
            return None
        options = session_options(threads=1)
        providers = execution_providers(device)
        session = ort.InferenceSession(
            TINY_MODEL, options, providers=providers, enable_fallback=False
        )
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # neither runtime's errors share a base class
        return f"it cannot run a model: {last_line(error)}"
    chosen = session.get_providers()[0]
    return None if chosen == providers[0][0] else f"ONNX Runtime chose {chosen}"


def _described(device: str) -> str:
    """What there is to say of a device that works."""
    if device == "openvino":
        return f"openvino {_version('openvino')}"
    if device != "cpu":
        return f"CUDA {ort.cuda_version}"
    quota = cpu_quota()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    source = " by TINYSERVE_NUM_THREADS" if os.environ.get("TINYSERVE_NUM_THREADS") else ""
    return (
        f"{default_threads()} threads{source}; {os.cpu_count()} cores, "
        f"{usable_cores()} in the affinity mask, {limit}"
    )


def _check_models(default: str) -> Iterator[Check]:
    found = installed_models()
    if not found:
        folders = ", ".join(map(str, search_folders()))
        yield Check(kind="model", name="models", status="problem", found=f"none in {folders}")
    for name, path in found.items():
        try:
            engine = Engine(path, self_test=False)
            difference = engine.self_test()
        except TinyserveError as error:
            yield Check(kind="model", name=name, status="problem", found=str(error))
            continue
        device, golden = device_name(engine.provider), engine.card.golden
        if golden is None or difference is None:
            said = f"runs on {device}, and has no golden images for a self-test"
        else:
            said = (
                f"passes its self-test on {device}: a probability is off by {difference:.1g}, "
                f"{golden.tolerance:g} allowed"
            )
        if engine.fallback and device != default:
            said += f" ({engine.fallback})"
        yield Check(kind="model", name=name, status="ok", found=said)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
