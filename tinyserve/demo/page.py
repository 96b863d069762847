"""The page as a whole, and how it keeps to itself."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.classifier import Classifier
from tinyserve.demo import endpoints, many_pictures, model_cards, one_picture
from tinyserve.demo.answers import Answers
from tinyserve.devices import default_threads
from tinyserve.errors import UsageError
from tinyserve.modelfile import model_names

if TYPE_CHECKING:
    import gradio as gr

FONTS = ("system-ui", "sans-serif")
MAX_UPLOAD = "256mb"

# What Gradio and its libraries read when they are imported.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # telemetry and the version check
    "GRADIO_RUN_HISTORY": "False",  # would keep the visitors' pictures in their browsers
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


def build_page(served: Sequence[str], load: Callable[[str], Classifier]) -> "gr.Blocks":
    """The page, not yet served; :func:`options` says how to.

    It offers the models ``served``, the first of which is chosen at first, and those that are
    installed. ``load`` gives the classifier of a name and keeps it: it is called for every answer.
    Raises :class:`UsageError` where Gradio is not installed, or nothing can be uploaded to.

    Uploads go to a new folder below ``$GRADIO_TEMP_DIR``, or the system's for temporary files, that
    is removed when the process ends; that variable then names it. Where Gradio is imported already,
    they go where it puts them.
    """
    _prepare_gradio()
    import gradio as gr

    models, model = list(dict.fromkeys([*model_names(), *served])), served[0]
    # Uploads are deleted after an hour.
    page: gr.Blocks
    with gr.Blocks(title="tinyserve", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        answers = Answers(models, load, Path(page.GRADIO_CACHE))
        endpoints.add(answers, model)  # first, so that nothing else takes their names
        gr.Markdown("# tinyserve\nSmall networks guess what is in your pictures.", elem_id="title")
        with gr.Tab("One picture"):
            one_picture.build(answers, model)
        with gr.Tab("Many pictures"):
            many_pictures.build(answers, model)
        with gr.Tab("Models") as tab:
            model_cards.build(tab, served, load)
    # Gradio's own limit is one: a visitor with a thousand pictures would hold up all others. A job
    # of the largest pictures takes half a gibibyte.
    page.queue(default_concurrency_limit=min(4, max(2, default_threads())))
    return page


def options() -> dict[str, Any]:
    """What ``launch`` of the page, or ``gradio.mount_gradio_app``, has to be told: its looks, and
    that nothing leaves this machine."""
    import gradio as gr

    # In the system's own fonts: Gradio's would have to be loaded from somewhere.
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=FONTS)
    return {
        "theme": theme,
        "css_paths": Path(__file__).with_name("style.css"),
        "footer_links": [],
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "max_file_size": MAX_UPLOAD,
    }


def _prepare_gradio() -> None:
    """Before it is imported: no telemetry, our own uploads. After: no fetching of addresses."""
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("PATH", os.defpath)  # which Gradio looks through for programs
    if "gradio" not in sys.modules:  # or it would no longer find what it has put elsewhere
        _keep_uploads_apart()
    try:
        import gradio as gr
        from gradio import processing_utils
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; the demo needs: pip install 'tinyserve[demo]'") from error

    async def refuse(url: str, cache_dir: str) -> str:  # noqa: ARG001 (Gradio names it)
        raise gr.Error(f"send the picture itself, not its address: {url}", print_exception=False)

    # A caller of the API may name an address in place of a file; Gradio would fetch it.
    processing_utils.async_ssrf_protected_download = refuse


def _keep_uploads_apart() -> None:
    """Gradio's own folder is one for all its applications, and belongs to whoever came first."""
    parent = os.environ.get("GRADIO_TEMP_DIR")
    try:
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="tinyserve-", dir=parent or None)
    except OSError as error:
        variable = "GRADIO_TEMP_DIR" if parent else "TMPDIR"
        raise UsageError(f"no folder for uploads: {error}; {variable} may name one") from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
