"""The demo page: ``python app.py``, then open the address that it prints.

The page only hands files to :class:`tinyserve.Classifier` and shows what comes back, so it says
exactly what ``tinyserve classify`` says. Neither the server nor the page in the browser calls any
other machine.
"""

import argparse
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from tinyserve import streams
from tinyserve.cli.arguments import add_device, port
from tinyserve.demo.answers import device, loader
from tinyserve.demo.page import build_page, options
from tinyserve.errors import TinyserveError, UsageError
from tinyserve.modelfile import DEFAULT_MODEL

__all__ = ["build_page", "loader", "main", "options"]


def main(argv: Sequence[str] | None = None) -> int:
    streams.prepare()
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        serve(arguments.host, arguments.port, arguments.model, arguments.device)
    except TinyserveError as error:
        print(f"tinyserve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    finally:
        streams.let_go_of_stdout()
    return 0


def serve(host: str, port: int, model: str, device_wanted: str | None) -> None:
    """Serve the page until interrupted; ``model`` is the one chosen at first.

    Raises :class:`TinyserveError` where the model or the device cannot be used, Gradio is not
    installed, or the address is taken.
    """
    load = loader(device_wanted)
    # The line below and the page say why the CPU runs; the logger need not say it too.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)
    runs_on = device(load(model))
    page = build_page([model], load)
    _keep_from_proxies(host)
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host and host[0] != "[" else host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            **options(),
        )
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: is the port taken, or the address not this "
            "machine's?"
        ) from error
    streams.announce(url, f"{model} on {runs_on}")
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def _keep_from_proxies(host: str) -> None:
    """Gradio asks its own server whether it is up; that must not go through a proxy."""
    names = ("no_proxy", "NO_PROXY")  # where both are set, the first is the one that counts
    given = next(filter(None, map(os.environ.get, names)), None)
    direct = ",".join(filter(None, (given, "localhost,127.0.0.1", host.strip("[]"))))
    os.environ.update(dict.fromkeys(names, direct))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="The tinyserve demo page.",
        epilog="Exit codes: 0 ended by Ctrl-C or SIGTERM, 1 failed, 2 wrong usage, 4 the model is "
        "not what it was, 5 the device asked for cannot run.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    # Gradio takes 0 for the port itself, and does not find its server there.
    page_port = functools.partial(port, least=1)
    add("--port", type=page_port, default=7860, help="port to listen on (default: %(default)s)")
    add(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        help="name or .onnx file, shown first (default: %(default)s)",
    )
    add_device(parser)
    return parser
