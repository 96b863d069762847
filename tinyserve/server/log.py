"""Log lines, for people or as JSON, on stderr."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

access = logging.getLogger("tinyserve.access")
"""Of requests: a line for each, whose fields are the record's attribute ``fields``."""


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
    return str(value).encode("unicode_escape").decode().replace(" ", r"\x20")
