"""The tab for one picture: what the model sees, its guesses, the other models', where it looked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from tinyserve.dataset import walk_images
from tinyserve.demo import render
from tinyserve.demo.answers import SAMPLES, Answers, Upload
from tinyserve.errors import TinyserveError

HEIGHT = 300


def build(answers: Answers, model: str) -> None:
    """Add the tab's content, with ``model`` chosen."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=4):
            with gr.Row(elem_id="pictures"):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    buttons=[],
                    height=HEIGHT,
                    min_width=120,
                    elem_id="picture",
                )
                seen = gr.Image(
                    label="The model sees",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=HEIGHT,
                    min_width=120,
                    elem_id="seen",
                    alt_text="The picture in the few pixels that the model gets",
                )
            seen_note = gr.Markdown(elem_id="seen-note", elem_classes="note")
            # One of every class folder.
            if samples := list({Path(p).parent: p for p in walk_images(SAMPLES)}.values()):
                gr.Examples(
                    samples,
                    picture,
                    label="Samples",
                    examples_per_page=len(samples),
                    elem_id="samples",
                )
        with gr.Column(scale=3):
            choice = gr.Radio(answers.models, value=model, label="Model")
            guesses = gr.HTML(render.GUESSES_HERE, elem_id="classes", elem_classes="answer")
    with gr.Row():
        with gr.Column(scale=4):
            table = gr.HTML(render.MODELS_HERE, elem_id="models", elem_classes="answer")
        with gr.Column(scale=3):
            button = gr.Button("Where did it look?", elem_id="explain")
            heat = gr.Image(
                label="Where it looked",
                format="png",
                interactive=False,
                buttons=["fullscreen", "download"],
                height=HEIGHT,
                elem_id="heat",
                alt_text="The picture under a heat map of the places that the guess rests on",
            )
            heat_note = gr.HTML(elem_id="heat-note", elem_classes="note")

    def show(picture: Upload | None, model: str) -> tuple[Any, ...]:
        if not _given(picture):
            return None, "", render.GUESSES_HERE, None, ""
        try:
            image = render.enlarged(answers.seen(picture, model))
            words = render.seen_words(answers.classifier(model).card)
            return image, words, render.bars(answers.classify(picture, model)), None, ""
        except TinyserveError as error:
            return None, "", render.problem(error, "classify this picture"), None, ""

    def compare(picture: Upload | None) -> str:
        if not _given(picture):
            return render.MODELS_HERE
        try:
            return render.comparison(answers.compare(picture))
        except TinyserveError:  # said once, beside the picture
            return render.MODELS_HERE

    def explain(picture: Upload | None, model: str) -> tuple[Any, str]:
        if not _given(picture):
            return None, "Choose a picture first."
        try:
            best, occlusion = answers.explain(picture, model)
            image = render.overlay(answers.seen(picture, model), occlusion.heat)
        except TinyserveError as error:
            return None, render.problem(error, "say where it looked")
        return image, render.heat_words(model, best, occlusion)

    common: dict[str, Any] = {
        "api_visibility": "private",
        # Gradio would open the picture first, fail without words on what is none, and save some
        # formats anew, with other pixels. Unprocessed, the very file arrives.
        "preprocess": False,
        # A picture chosen while another is on its way is answered last.
        "trigger_mode": "always_last",
    }
    gr.on(
        [picture.change, choice.change],
        show,
        [picture, choice],
        [seen, seen_note, guesses, heat, heat_note],
        show_progress="hidden",
        **common,
    ).then(compare, picture, table, show_progress="hidden", **common)
    button.click(
        explain,
        [picture, choice],
        [heat, heat_note],
        show_progress_on=heat,
        **common,
    )


def _given(picture: Upload | None) -> TypeGuard[Upload]:
    """Whether there is a picture; Gradio also hands over mappings that name none."""
    return isinstance(picture, Mapping) and bool(picture.get("path"))
