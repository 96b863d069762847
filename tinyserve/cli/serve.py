"""``tinyserve serve``: models over HTTP."""

import argparse
from pathlib import Path

from tinyserve.cli.arguments import Commands, add_device, add_models, count, number, port
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
    default = Settings()
    models = ", ".join(default.models)
    add_models(command, f", the first is the default of /classify (default: {models})")
    add = command.add_argument
    add("--host", default=default.host, help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=port,
        default=default.port,
        help="port to listen on, 0 for any that is free (default: %(default)s)",
    )
    add_device(command)
    add(
        "--max-batch-size",
        type=count,
        default=default.max_batch_size,
        metavar="N",
        help="images computed at a time, at most (default: %(default)s)",
    )
    add(
        "--max-delay-ms",
        type=_milliseconds,
        default=default.max_delay_ms,
        metavar="MS",
        help="milliseconds that an image may wait for others while the device is idle "
        "(default: %(default)g)",
    )
    add(
        "--max-queue",
        type=count,
        default=default.max_queue,
        metavar="N",
        help="images on their way at a time; more are told to come back (default: %(default)s)",
    )
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="ask for one of the keys in it, one a line; goes without --ui",
    )
    add("--ui", action="store_true", help="put the demo page at /; goes without --api-key-file")
    add(
        "--log-format",
        choices=LOG_FORMATS,
        default=default.log_format,
        help="of requests, on stderr (default: %(default)s)",
    )


def serve(arguments: argparse.Namespace) -> int:
    serve_http(
        Settings(
            models=tuple(arguments.model or Settings().models),
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            max_batch_size=arguments.max_batch_size,
            max_delay_ms=arguments.max_delay_ms,
            max_queue=arguments.max_queue,
            api_key_file=arguments.api_key_file,
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
