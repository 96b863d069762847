"""What the page asks of the models: files in, plain values out, and no Gradio.

A file arrives as Gradio hands it over unprocessed: a mapping with ``path``, where the upload lies,
and ``orig_name``, what its owner calls it. Every function raises
:class:`~tinyserve.errors.TinyserveError`.
"""

import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyserve import images
from tinyserve.classifier import Classifier, Prediction
from tinyserve.dataset import Input, find_inputs
from tinyserve.engine import device_name
from tinyserve.errors import DataError, ImageError, TinyserveError, UsageError
from tinyserve.occlusion import Occlusion, occlude

Upload = Mapping[str, Any]

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
"""Of the checkout that this package runs from; an installed package has none."""
MAX_PICTURES = 1_000
MAX_BYTES = 64 * 2**20
"""Of one file in an archive, unpacked: more than any picture of images.MAX_PIXELS needs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model says of one picture, the file decoded anew. Without predictions, ``error``
    says why the model cannot be used."""

    model: str
    device: str = ""
    parameters: int = 0
    milliseconds: float = 0.0
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


class Answers:
    """The questions that the page can put, to models by name.

    ``load`` gives the classifier of a name and keeps it; ``uploads`` is the folder in which files
    have to lie: what comes over the network must not name just any file of this machine.
    """

    def __init__(
        self, models: Sequence[str], load: Callable[[str], Classifier], uploads: Path
    ) -> None:
        self.models = list(models)
        self._load = load
        self._uploads = uploads.resolve()

    def classify(self, picture: Upload, model: str) -> Answer:
        """One model's five likeliest classes."""
        return _answer(model, self.classifier(model), self._file(picture))

    def compare(self, picture: Upload) -> list[Answer]:
        """Every model's; one that cannot be loaded says so and leaves the others alone."""
        file = self._file(picture)
        answers = []
        for model in self.models:
            try:
                answers.append(_answer(model, self.classifier(model), file))
            except ImageError:
                raise
            except TinyserveError as error:
                answers.append(Answer(model, error=str(error)))
        return answers

    def seen(self, picture: Upload, model: str) -> NDArray[np.uint8]:
        """The picture as the model gets it: uint8 ``(size, size, 3)``."""
        return images.load(self._file(picture), size=self.classifier(model).card.image_size)

    def explain(self, picture: Upload, model: str) -> tuple[Prediction, Occlusion]:
        """The likeliest class, and where in the picture the evidence for it lies."""
        classifier = self.classifier(model)
        best = classifier.classify(self._file(picture), k=1)[0]
        return best, occlude(classifier.engine, self.seen(picture, model), best.index)

    def inputs(self, files: Sequence[Upload]) -> list[Input]:
        """All pictures in files that are pictures or zip archives of pictures."""
        found: list[Input] = []
        for upload in files:
            file, name = self._file(upload), _name(upload)
            if name.lower().endswith(".zip"):
                found.extend(_members(file, name))
            else:
                found.append(_File(name, None, file))
        if not found:
            raise DataError("no pictures in there")
        if len(found) > MAX_PICTURES:
            raise UsageError(
                f"{len(found):,} pictures, more than the {MAX_PICTURES:,} that the page takes at "
                "once; `tinyserve classify` has no limit"
            )
        return found

    def classifier(self, model: str) -> Classifier:
        if model not in self.models:
            raise UsageError(f"unknown model {model!r} (known: {', '.join(self.models)})")
        return self._load(model)

    def _file(self, upload: Upload) -> Path:
        if not isinstance(upload, Mapping) or not isinstance(upload.get("path"), str):
            raise UsageError("send an uploaded file")
        path = Path(upload["path"].replace("\0", "")).resolve()  # resolve() balks at null bytes
        if not path.is_relative_to(self._uploads):
            raise ImageError("this file was not uploaded")
        return path


def samples() -> list[Input]:
    """The sample pictures, labelled; none where there is no folder of them."""
    if not SAMPLES.is_dir():
        return []
    found = find_inputs([str(SAMPLES)])
    return [_File(os.path.relpath(i.path, SAMPLES), i.label, Path(i.path)) for i in found]


def device(classifier: Classifier) -> str:
    """What really runs the model, and why it is not CUDA where that was hoped for."""
    engine = classifier.engine
    reason = f"; not on CUDA: {engine.fallback}" if engine.fallback else ""
    return device_name(engine.provider) + reason


def _answer(model: str, classifier: Classifier, file: Path) -> Answer:
    start = time.perf_counter()
    predictions = classifier.classify(file)
    milliseconds = 1000 * (time.perf_counter() - start)
    parameters = classifier.card.parameters
    return Answer(model, device(classifier), parameters, milliseconds, predictions)


def _name(upload: Upload) -> str:
    return str(upload.get("orig_name") or Path(str(upload["path"])).name)


@dataclass(frozen=True, slots=True)
class _File(Input):
    """A file, under the name that its owner knows it by."""

    file: Path

    def read(self) -> bytes:
        return images.read(self.file)


@dataclass(frozen=True, slots=True)
class _Member(Input):
    """A file inside an archive, unpacked into memory when it is read, never onto the disk."""

    archive: Path
    member: str

    def read(self) -> bytes:
        try:
            with zipfile.ZipFile(self.archive) as archive, archive.open(self.member) as file:
                data = file.read(MAX_BYTES + 1)
        # Damage, encryption and unknown compression all have errors of their own.
        except Exception as error:
            raise ImageError(f"cannot unpack: {error}") from error
        if len(data) > MAX_BYTES:
            raise ImageError(f"unpacks to more than {MAX_BYTES >> 20} MiB")
        return data


def _members(archive: Path, name: str) -> Iterator[Input]:
    """The pictures in an archive; the folder that one lies in is its label."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member.filename for member in opened.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} is no zip archive, or damaged: {error}") from error
    for member in members:
        path = Path(member)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if path.suffix.lower() in images.SUFFIXES and not hidden:
            yield _Member(f"{name}/{member}", path.parent.name or None, archive, member)
