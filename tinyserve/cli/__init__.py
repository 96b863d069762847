"""The command line, ``tinyserve COMMAND``: a module a command, or a few that belong together.

Each declares its arguments in ``add_to``, and every command is a function of them. Results go to
stdout, everything else to stderr. Exit codes: 0 clean, 1 failure, 2 usage, 3 finished but some
inputs failed, 4 a model is not what it was, 5 the device asked for cannot run.

Of a cold start, most is imports: only the module of the command that is run is imported, and what
few of its uses need inside its functions.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import tinyserve
from tinyserve import streams
from tinyserve.errors import TinyserveError, describe_os_error

_COMMANDS = {
    "classify": "classify",
    "models": "models",
    "info": "models",
    "labels": "models",
    "verify": "checks",
    "compare": "checks",
    "bench": "bench",
    "adopt": "adopt",
    "doctor": "doctor",
    "triton": "triton",
    "serve": "serve",
}
"""Command to the module that has it. In this order they are in the help."""

_EPILOG = """\
Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 some inputs failed, 4 a model is
not what it was, 5 the device asked for cannot run, 130 interrupted by Ctrl-C.

Environment:
  TINYSERVE_DEVICE       in place of --device
  TINYSERVE_MODELS       folders searched for models instead of exported/,
                         separated as in PATH
  TINYSERVE_NUM_THREADS  cores to use (default: all that this process may)
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    streams.prepare()
    logging.basicConfig(format="tinyserve: %(message)s", level=logging.WARNING, force=True)
    try:
        arguments = _parser(*argv[:1]).parse_args(argv)
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except TinyserveError as error:
        print(f"tinyserve: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        return 0
    except OSError as error:  # a full disk behind stdout, for one
        print(f"tinyserve: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tinyserve: interrupted", file=sys.stderr)
        return 130
    finally:
        streams.let_go_of_stdout()


class _Version(argparse.Action):
    """Prints the version. To find it takes a while, which only those wait who ask."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("tinyserve", tinyserve.__version__)
        parser.exit()


def _parser(command: str = "") -> argparse.ArgumentParser:
    """For one command, or for all where it is none of them."""
    parser = argparse.ArgumentParser(
        prog="tinyserve",
        description="Classify images with small, self-describing ONNX models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    modules = [_COMMANDS[command]] if command in _COMMANDS else _COMMANDS.values()
    for module in dict.fromkeys(modules):
        importlib.import_module(f"tinyserve.cli.{module}").add_to(commands)
    return parser
