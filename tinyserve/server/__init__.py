"""HTTP around the one predictor: Open Inference Protocol V2, a route for people, metrics.

This module needs nothing but tinyserve itself; the others need the extra ``serve``.
"""

import gc
from dataclasses import dataclass, field
from pathlib import Path

from tinyserve import streams
from tinyserve.errors import UsageError, check_at_least_one
from tinyserve.modelfile import DEFAULT_MODEL

LOG_FORMATS = ("text", "json")
MOST_IN_A_BATCH = 4096
"""Images. A batch of the largest size is computed at the start, and must find memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask for, and for how long it may keep the server waiting."""

    body_bytes: int = 32 * 2**20
    json_bytes: int = 8 * 2**20
    """Less than of a body: a document takes twenty times its length when it is taken apart."""
    all_bodies_bytes: int = 512 * 2**20
    """Of all requests that are in the server at a time."""
    head_bytes: int = 64 * 2**10
    head_seconds: float = 10.0
    """From the connection to the last of the request's headers."""
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    """From the end of an answer until it has been fetched."""
    idle_seconds: int = 60
    """For which a connection without a request is kept."""
    leave_seconds: float = 1.0
    """For which the server goes on, though not ready, after it was told to end: so long balancers
    need to notice, and clients to hear that their connections will be closed."""
    end_seconds: int = 30
    """For which requests are then waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``tinyserve serve`` is asked for; ``port`` 0 is any that is free."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    max_batch_size: int = 32
    max_delay_ms: float = 0.0
    max_queue: int = 256
    api_key_file: Path | None = None
    ui: bool = False
    """Whether the demo page is at ``/``."""
    log_format: str = "text"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if isinstance(self.models, str) or not self.models:
            raise UsageError("models are one name or more, in a tuple")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be from 0 to 65535, not {self.port}")
        check_at_least_one("max_batch_size", self.max_batch_size)
        if self.max_batch_size > MOST_IN_A_BATCH:
            raise UsageError(f"max_batch_size must be at most {MOST_IN_A_BATCH:,}")
        check_at_least_one("max_queue", self.max_queue)
        if not self.max_delay_ms >= 0:
            raise UsageError(f"max_delay_ms must be at least 0, not {self.max_delay_ms}")
        if self.log_format not in LOG_FORMATS:
            raise UsageError(f"log_format is one of {', '.join(LOG_FORMATS)}: {self.log_format!r}")


def serve(settings: Settings) -> None:
    """Serve until told to end by SIGTERM or Ctrl-C.

    Raises :class:`~tinyserve.errors.TinyserveError` where a model or the device cannot be used, the
    address is taken, or the extra is not installed.
    """
    if settings.ui and settings.api_key_file:
        raise UsageError("browsers have no key to show: --ui goes without --api-key-file")
    try:
        from tinyserve.server import log, run
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; serving needs: pip install 'tinyserve[serve]'") from error
    log.configure(settings.log_format)
    run.allow_many_connections()
    listener = run.Listener(settings)
    streams.announce(*listener.lines())
    # What is loaded stays. To look through all of it for garbage, as happens every few thousand
    # requests otherwise, holds up those that are there.
    gc.collect()
    gc.freeze()
    listener.run()
