"""The tab for many pictures: files and zip archives in, a gallery, a table and a CSV file out."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tinyserve import images
from tinyserve.classifier import Classifier, Result
from tinyserve.dataset import Input
from tinyserve.demo.answers import MAX_PICTURES, SAMPLES, Answers, Upload, samples
from tinyserve.demo.render import download, mark, percent, problem, totals
from tinyserve.errors import TinyserveError
from tinyserve.output import open_rows
from tinyserve.report import Tally

THUMBNAIL_SIDE = 160
MAX_SHOWN = 200
"""Pictures in the gallery; the table has them all."""
HEADERS = ["picture", "guess", "probability", "right", "shows", "second guess"]


def build(answers: Answers, model: str) -> None:
    """Add the tab's content, with ``model`` chosen."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=4):
            files = gr.File(
                label=f"Pictures and zip archives of pictures, {MAX_PICTURES:,} at most",
                file_count="multiple",
                height=220,
                elem_id="files",
            )
        with gr.Column(scale=3):
            choice = gr.Radio(answers.models, value=model, label="Model")
            start = gr.Button("Classify them", variant="primary")
            take_samples = gr.Button("Try the samples", visible=SAMPLES.is_dir())
            gr.Markdown(
                "If an archive has a folder for each class, named as the class is, you will see "
                "how many guesses are right.",
                elem_classes="note",
            )
    words = gr.HTML(elem_id="totals", elem_classes="answer", min_height=60)
    gallery = gr.Gallery(
        label="Guesses",
        show_label=False,
        columns=6,
        fit_columns=False,
        height="auto",
        object_fit="cover",
        format="png",
        interactive=False,
        buttons=["fullscreen"],
        visible=False,
        elem_id="gallery",
    )
    table = gr.Dataframe(
        headers=HEADERS,
        interactive=False,
        max_height=480,
        buttons=["fullscreen", "copy"],
        visible=False,
        elem_id="table",
    )

    def answer(inputs: Callable[[], list[Input]], model: str, progress: gr.Progress) -> list[Any]:
        try:
            text, shown, rows = _classify(answers.classifier(model), inputs(), model, progress)
        except TinyserveError as error:
            text, shown, rows = problem(error, "classify these pictures"), [], []
        return [
            text,
            gr.Gallery(shown, visible=bool(shown)),
            gr.Dataframe(rows, visible=bool(rows)),
        ]

    def classify_files(
        files: list[Upload] | None,
        model: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (where Gradio looks for it)
    ) -> list[Any]:
        return answer(lambda: answers.inputs(files or []), model, progress)

    def classify_samples(
        model: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        return answer(samples, model, progress)

    common: dict[str, Any] = {
        "outputs": [words, gallery, table],
        "api_visibility": "private",
        "preprocess": False,  # the very files, as in one_picture
        "show_progress_on": words,
    }
    start.click(classify_files, [files, choice], **common)
    take_samples.click(classify_samples, choice, **common)


def _classify(
    classifier: Classifier, inputs: Sequence[Input], model: str, progress: Any
) -> tuple[str, list[tuple[Image.Image, str]], list[list[str]]]:
    """Words, the gallery's pictures with captions, and the table's rows."""
    tally = Tally()
    shown: list[tuple[Image.Image, str]] = []
    rows: list[list[str]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "predictions.csv")
        model_version = classifier.fingerprint
        with open_rows(str(file), "csv", k=5, model=model_version) as write:
            for number, result in enumerate(classifier.classify_many(inputs), 1):
                progress((number, len(inputs)), unit="pictures")
                tally.add(result)
                write(result)
                rows.append(_row(result))
                if result.error is None and len(shown) < MAX_SHOWN:
                    shown.append((_thumbnail(result), _caption(result)))
        link = download(file)
    summary = tally.summary(
        model=model,
        precision=classifier.card.precision,
        provider=classifier.engine.provider,
        seconds=time.perf_counter() - start,
    )
    return totals(summary) + link, shown, rows


def _thumbnail(result: Result) -> Image.Image:
    return Image.fromarray(images.load(result.input.read(), size=THUMBNAIL_SIDE))


def _caption(result: Result) -> str:
    best = result.predictions[0]
    return f"{mark(result.correct)} {best.name} {percent(best.probability)}".strip()


def _row(result: Result) -> list[str]:
    best, second = [*result.predictions[:2], None, None][:2]
    return [
        result.path,
        best.name if best else f"⚠️ {result.error}",
        percent(best.probability) if best else "",
        mark(result.correct),
        result.label.name if result.label else "",
        second.name if second else "",
    ]
