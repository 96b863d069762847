"""What programs can ask for by name, with ``gradio_client``: the page's answers as plain JSON.

::

    from gradio_client import Client, handle_file

    Client("http://127.0.0.1:7860").predict(handle_file("cat.jpg"), api_name="/classify")

An error comes back as Gradio's, with the words of ours.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from tinyserve.demo.answers import Answers, Upload
from tinyserve.errors import TinyserveError
from tinyserve.output import document


def add(answers: Answers, model: str) -> None:
    """Add the endpoints to the page that is being built; ``model`` answers where none is named."""
    import gradio as gr
    from gradio.events import api

    @contextlib.contextmanager
    def errors_in_words() -> Iterator[None]:
        try:
            yield
        except TinyserveError as error:
            raise gr.Error(str(error), print_exception=False) from error

    @errors_in_words()
    def classify(picture: Upload, model: str = model) -> dict[str, Any]:
        """One model's five likeliest classes of a picture, best first."""
        return dataclasses.asdict(answers.classify(picture, model))

    @errors_in_words()
    def compare(picture: Upload) -> list[dict[str, Any]]:
        """What every model says of a picture."""
        return [dataclasses.asdict(answer) for answer in answers.compare(picture)]

    @errors_in_words()
    def explain(picture: Upload, model: str = model) -> dict[str, Any]:
        """The likeliest class, and what covering each pixel's place costs its probability."""
        best, occlusion = answers.explain(picture, model)
        return {
            "prediction": dataclasses.asdict(best),
            "lowest": occlusion.lowest,
            "heat": occlusion.heat.tolist(),
        }

    @errors_in_words()
    def classify_many(files: list[Upload] | Upload, model: str = model) -> list[dict[str, Any]]:
        """A row for every picture in files and zip archives, or in one: what ``tinyserve classify``
        writes as JSON lines, with ``picture`` for ``path``."""
        classifier = answers.classifier(model)
        results = classifier.classify_many(answers.inputs(files))
        rows = [document(result, classifier.fingerprint) for result in results]
        # Gradio's client takes everything with a "path" for a file that it has to fetch.
        return [{"picture": row.pop("path"), **row} for row in rows]

    def models() -> list[str]:
        """The models' names, as the other endpoints take them."""
        return answers.models

    for endpoint in (classify, compare, explain, classify_many, models):
        api(endpoint, api_name=endpoint.__name__)
