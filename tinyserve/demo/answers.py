"""What the page asks of the models: files in, plain values out, and no Gradio.

A file arrives as Gradio hands it over unprocessed: a mapping whose ``path`` says where the upload
lies. Every function raises :class:`~tinyserve.errors.TinyserveError`.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyserve import images
from tinyserve.classifier import Classifier, Prediction
from tinyserve.dataset import Input, find_inputs
from tinyserve.devices import device_name
from tinyserve.errors import DataError, ImageError, TinyserveError, UsageError
from tinyserve.members import Member, is_archive
from tinyserve.occlusion import Occlusion, occlude

Upload = Mapping[str, Any]

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
"""Of the checkout that this package runs from; an installed package has none."""
MAX_PICTURES = 1_000


class _NamedInput(Input):
    """A picture under its visitor's name for it, which is no file's here, nor anybody's business if
    it were."""

    __slots__ = ()

    @property
    def version(self) -> str:
        return ""


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

    def inputs(self, files: list[Upload] | Upload) -> list[Input]:
        """All pictures in files, or in one, that are pictures or zip archives of pictures."""
        found: list[Input] = []
        for upload in files if isinstance(files, list) else [files]:
            file = self._file(upload)
            # Other archives are read from their beginning: counting would be reading them whole.
            if is_archive(str(file)) and file.suffix.lower() != ".zip":
                raise UsageError(f"{file.name}: of archives, the page takes zip")
            found.extend(itertools.islice(_inputs(file, file.parent), MAX_PICTURES + 1))
            if len(found) > MAX_PICTURES:
                raise UsageError(
                    f"more than {MAX_PICTURES:,} pictures; `tinyserve classify` takes any number"
                )
        if not found:
            raise UsageError("choose some first")
        return found

    def classifier(self, model: str) -> Classifier:
        if model not in self.models:
            raise UsageError(f"unknown model {model!r} (known: {', '.join(self.models)})")
        return self._load(model)

    def _file(self, upload: Upload) -> Path:
        if not isinstance(upload, Mapping) or not isinstance(upload.get("path"), str):
            raise UsageError("send an uploaded file")
        try:
            path = Path(upload["path"]).resolve()
            there = path.exists()
        except (OSError, ValueError) as error:  # a path too long, or with null bytes
            raise ImageError("this file was not uploaded") from error
        inside = path.is_relative_to(self._uploads)
        if inside and not there:
            raise ImageError("this file is not here: uploads are kept for an hour")
        # A file alone: with the folder itself one would get what others uploaded.
        if not (inside and path.is_file()):
            raise ImageError("this file was not uploaded")
        return path


def loader(device: str | None) -> Callable[[str], Classifier]:
    """What gives the classifier of a name, loaded when it is first asked for, and then kept."""
    loading = threading.Lock()
    loaded: dict[str, Classifier] = {}

    def load(name: str) -> Classifier:
        if name not in loaded:  # or who asks for another would wait for the one that loads
            with loading:
                if name not in loaded:  # two visitors may ask for it at a time
                    loaded[name] = Classifier(name, device=device)
        return loaded[name]

    return load


def samples() -> list[Input]:
    """The sample pictures, labelled; none where there is no folder of them."""
    return list(_inputs(SAMPLES, SAMPLES)) if SAMPLES.is_dir() else []


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


def _inputs(path: Path, root: Path) -> Iterator[Input]:
    """What is in a file or folder, under names that begin at ``root``: what lies above is nobody's
    business."""
    try:
        for found in find_inputs([str(path)]):
            name = found.path.removeprefix(f"{root}{os.sep}")
            member = Member(name, None, found.read)
            yield _NamedInput(name, found.label, member, found.folders)
    except DataError as error:
        raise DataError(str(error).replace(f"{root}{os.sep}", "")) from error
