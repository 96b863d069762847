"""``tinyserve serve``: models over HTTP."""

import argparse
from pathlib import Path

from tinyserve.cli.arguments import Commands, add_device, count, number, whole
from tinyserve.modelfile import DEFAULT_MODEL
from tinyserve.server import LOG_FORMATS, Settings
from tinyserve.server import serve as serve_http


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "serve",
        help="serve models over HTTP",
        description="Serve models over HTTP: the Open Inference Protocol V2 under /v2, /classify "
        "for files as they are, /metrics for Prometheus; /docs lists it all. A model file that is "
        "replaced takes over without a restart.",
    )
    command.set_defaults(command=serve)
    add = command.add_argument
    add(
        "-m",
        "--model",
        action="append",
        help=f"name or .onnx file; may be repeated, the first is the default of /classify "
        f"(default: {DEFAULT_MODEL})",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8000, help="default: %(default)s; 0 for any")
    add_device(command)
    add("--max-batch-size", type=count, default=32, help="default: %(default)s")
    add(
        "--max-delay-ms",
        type=_milliseconds,
        default=0.0,
        help="for which an image waits for others while nothing is computed (default: 0)",
    )
    add(
        "--max-queue",
        type=count,
        default=256,
        help="images on their way at a time; more are told to come back (default: %(default)s)",
    )
    add("--api-key-file", metavar="FILE", help="ask for one of the keys in it, one a line")
    add("--ui", action="store_true", help="put the demo page at /")
    add("--log-format", choices=LOG_FORMATS, default="text", help="of requests, on stderr")


def serve(arguments: argparse.Namespace) -> int:
    serve_http(
        Settings(
            models=tuple(arguments.model or [DEFAULT_MODEL]),
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            max_batch_size=arguments.max_batch_size,
            max_delay_ms=arguments.max_delay_ms,
            max_queue=arguments.max_queue,
            api_key_file=Path(arguments.api_key_file) if arguments.api_key_file else None,
            ui=arguments.ui,
            log_format=arguments.log_format,
        )
    )
    return 0


def _milliseconds(text: str) -> float:
    found = number(text)
    if not 0 <= found <= 60_000:
        raise argparse.ArgumentTypeError("must be from 0 to 60000")
    return found


def _port(text: str) -> int:
    port = whole(text)
    if not 0 <= port <= 65_535:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return port
