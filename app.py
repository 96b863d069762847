"""The demo page: ``python app.py``, then open the address that it prints.

One picture in, its five likeliest classes out. The page only hands the picture's file to
:class:`tinyserve.Classifier` and shows what comes back, so it says exactly what
``tinyserve classify`` says. Neither the server nor the page in the browser calls any other machine.
"""

import argparse
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve import Classifier, Prediction, TinyserveError
from tinyserve.dataset import walk_images
from tinyserve.devices import DEVICES, device_name
from tinyserve.engine import Engine
from tinyserve.errors import ImageError, UsageError
from tinyserve.modelfile import DEFAULT_MODEL, model_names

if TYPE_CHECKING:
    import gradio as gr

SAMPLES = Path(__file__).resolve().parent / "samples"
FONTS = ("system-ui", "sans-serif")
CSS = """
.gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto !important; }
#picture img { width: 100%; height: 100%; object-fit: contain; } /* small ones are enlarged */
#classes h2 { padding-top: 2rem; } /* clear of the label */
#samples .gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(52px, 1fr)); }
#samples .gallery-item, #samples .gallery img { width: 100%; height: auto; aspect-ratio: 1; }
#samples .gallery .container { width: 100%; height: 100%; }
@media (max-width: 640px) { /* one row to swipe, so that the answer stays in sight */
  #samples .gallery { grid: auto / auto-flow 56px; overflow-x: auto; }
}
"""

Answer = tuple[dict[str, float], str]

# What Gradio and its libraries read when they are imported.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",  # telemetry and the version check
    "GRADIO_RUN_HISTORY": "False",  # would keep the visitors' pictures in their browsers
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    # Gradio asks its own server whether it is up; that must not go through a proxy.
    "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1"))),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        serve(arguments.host, arguments.port, arguments.model, arguments.device)
    except TinyserveError as error:
        print(f"tinyserve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def serve(host: str, port: int, model: str, device: str | None) -> None:
    """Serve the page until interrupted; ``model`` is the one chosen at first.

    Raises :class:`TinyserveError` where the model or the device cannot be used, Gradio is not
    installed, or the address is taken.
    """
    # The line below and the page say why the CPU runs; the logger need not say it too.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)
    device_line = _device(load(model, device).engine)
    page = build_page(model, device)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            theme=_theme(),
            css=CSS,
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}; is it taken?") from error
    print(f"{url}\n{model} on {device_line}", flush=True)
    while True:
        time.sleep(3600)


def build_page(model: str, device: str | None) -> "gr.Blocks":
    """The page, not yet served; its one API endpoint is ``/classify``.

    :class:`TinyserveError` where Gradio is not installed.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; the demo needs: pip install 'tinyserve[demo]'") from error
    _refuse_addresses()
    models = list(dict.fromkeys([*model_names(), model]))
    # Uploads are deleted after an hour.
    page = gr.Blocks(title="tinyserve", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.Markdown("# tinyserve\nWhat is in the picture? Five guesses of a small network.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=280,
                    elem_id="picture",
                )
                if samples := _samples():
                    gr.Examples(
                        samples,
                        image,
                        label="Samples",
                        examples_per_page=len(samples),
                        elem_id="samples",
                    )
            with gr.Column():
                choice = gr.Radio(models, value=model, label="Model")
                label = gr.Label(label="Likeliest classes", elem_id="classes")
                status = gr.Markdown(elem_id="status")
        gr.on(
            [image.change, choice.change],
            _handler(models, device, Path(image.GRADIO_CACHE)),
            inputs=[image, choice],
            outputs=[label, status],
            api_name="classify",
            # Gradio would open the picture first, fail without words on what is none, and save
            # some formats anew, with other pixels. Unprocessed, the very file arrives.
            preprocess=False,
            # A picture chosen while another is on its way is answered last.
            trigger_mode="always_last",
            show_progress="hidden",
        )
    return page


def _handler(
    models: Sequence[str], device: str | None, uploads: Path
) -> Callable[[dict[str, Any] | None, str], Answer]:
    def classify(image: dict[str, Any] | None, model: str) -> Answer:
        """Classify one picture: its likeliest classes with probabilities, and a line of words."""
        if not image or not image["path"]:
            return {}, ""
        path = Path(image["path"]).resolve()
        try:
            # What comes over the network must not name just any file of this machine.
            if model not in models:
                raise UsageError(f"unknown model {model!r}")
            if not path.is_relative_to(uploads.resolve()):
                raise ImageError("this file was not uploaded")
            classifier = load(model, device)
            start = time.perf_counter()
            predictions = classifier.classify(path)
            milliseconds = 1000 * (time.perf_counter() - start)
        except TinyserveError as error:
            return {}, f"⚠️ **Cannot classify this picture:** {error}"
        return _bars(predictions), f"{milliseconds:.1f} ms on {_device(classifier.engine)}"

    return classify


@functools.cache
def load(model: str, device: str | None) -> Classifier:
    """A classifier, loaded when it is first asked for. :class:`TinyserveError` where that fails."""
    return Classifier(model, device=device)


def _device(engine: Engine) -> str:
    reason = f"; not on CUDA: {engine.fallback}" if engine.fallback else ""
    return device_name(engine.provider) + reason


def _bars(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Probability by name; classes that share a name are told apart by their wnid."""
    names = [prediction.name for prediction in predictions]
    return {
        p.name if names.count(p.name) == 1 else f"{p.name} ({p.wnid})": p.probability
        for p in predictions
    }


def _samples() -> list[str]:
    """One picture of every class folder; empty where there are none."""
    return list({str(Path(path).parent): path for path in walk_images(SAMPLES)}.values())


def _refuse_addresses() -> None:
    """A caller of the API may name an address in place of a file; Gradio would fetch it."""
    import gradio as gr
    from gradio import processing_utils

    async def refuse(url: str, cache_dir: str) -> str:  # noqa: ARG001 (Gradio names it)
        raise gr.Error(f"send the picture itself, not its address: {url}", print_exception=False)

    processing_utils.async_ssrf_protected_download = refuse


def _theme() -> "gr.Theme":
    """In the system's own fonts: Gradio's would have to be loaded from somewhere."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=FONTS,
        font_mono=FONTS,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The tinyserve demo page.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model shown first (%(default)s)")
    parser.add_argument("--device", choices=DEVICES, help="$TINYSERVE_DEVICE or auto by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
