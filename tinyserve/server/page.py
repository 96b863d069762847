"""The demo page on the server's own address, over the very models that it serves."""

import functools

from fastapi import FastAPI

from tinyserve.classifier import Classifier
from tinyserve.server import Settings
from tinyserve.server.models import Models


def add_page(app: FastAPI, models: Models, settings: Settings) -> None:
    """Put the page at ``/``, behind all routes that there are.

    Raises :class:`~tinyserve.errors.UsageError` where Gradio is not installed.
    """
    from tinyserve.demo import build_page, options

    @functools.cache  # those that are not served are loaded when they are first asked for
    def load_other(name: str) -> Classifier:
        return Classifier(name, device=settings.device)

    def load(name: str) -> Classifier:
        # Asked for anew each time: a file that is replaced takes over here, too.
        return models.classifiers.get(name) or load_other(name)

    page = build_page(models.names[0], load)

    import gradio

    gradio.mount_gradio_app(app, page, "/", **options())
