"""Log lines, for people or as JSON, on stderr."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

_access = logging.getLogger("tinyserve.access")


def request(fields: dict[str, Any]) -> None:
    """A line for a request."""
    if _access.isEnabledFor(logging.INFO):
        # Made here: a logger would look for the place in the code, which nobody is told.
        record = logging.LogRecord(_access.name, logging.INFO, "", 0, "", (), None)
        record.fields = fields
        _access.handle(record)


def configure(format_: str) -> None:
    """Write records of level WARNING, and all of requests, in one of ``LOG_FORMATS``."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if format_ == "json" else _Text())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tinyserve").setLevel(logging.INFO)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        if fields is None:
            return f"tinyserve: {super().format(record)}"
        values = {key: value for key, value in fields.items() if value is not None}
        shown = [_time(record), *(f"{key}={_printable(value)}" for key, value in values.items())]
        return " ".join(shown)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        document |= {"message": super().format(record)} if fields is None else fields
        return json.dumps(document)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _printable(value: Any) -> str:
    """On one line without spaces, whatever a client sent."""
    text = str(value)
    if text.isalnum() and text.isascii():
        return text
    return text.encode("unicode_escape").decode().replace(" ", r"\x20")
