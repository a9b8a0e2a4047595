"""Log lines: JSON or console format, and the logging configuration of the process."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

Format = Literal["json", "console"] | None  # None: `console` on a terminal, else `json`


def line(created: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    """One log record as a line of JSON. `created`: unix seconds. A line break in a value is escaped."""
    time = datetime.fromtimestamp(created, UTC)
    record = {"time": time, "level": level, "logger": logger, "message": message, **fields}
    try:
        return orjson.dumps(record, str, orjson.OPT_UTC_Z).decode()
    except TypeError:  # a lone surrogate in a text from outside
        return json.dumps(record, default=str)


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


class Console(logging.Formatter):
    """A readable line: the same fields as `name=value`, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(
            f" {name}={value if isinstance(value, int | float) else json.dumps(value, default=str)}"
            for name, value in getattr(record, "fields", {}).items()
            if value is not None
        )
        text = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class LineHandler(logging.StreamHandler[TextIO]):
    """A stream handler that also accepts lines which are already formatted."""

    def write(self, lines: list[str]) -> None:
        self.acquire()
        try:
            self.stream.write("\n".join([*lines, ""]))
            self.stream.flush()
        except (OSError, ValueError):  # the reader of the log has gone
            pass
        finally:
            self.release()


def configure_logging(level: str, format: Format) -> None:
    """Send all loggers of the process through one handler on stderr. uvicorn's own access log is not used."""
    logging.basicConfig(level=level.upper(), handlers=[_handler(format)], force=True)
    # Not part of any line, and each costs time per record (https://docs.python.org/3/howto/logging.html#optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("httpx").setLevel("WARNING")
    # For a WebSocket, uvicorn logs all headers and messages at level `debug`. They may contain a token.
    logging.getLogger("uvicorn.error").setLevel(max(logging.INFO, logging.getLogger().level))
    _keep_queries_out()


def configure_own_logging(level: str, format: Format) -> None:
    """Send the loggers of this application through a handler on stderr, unless the server has configured logging.

    uvicorn's access log, which would be a second line for each request, is switched off.
    """
    logger = logging.getLogger("backend")
    if not logger.hasHandlers():
        logger.addHandler(_handler(format))
        logger.setLevel(level.upper())
        _keep_queries_out()


def _handler(format: Format) -> logging.Handler:
    is_console = format == "console" or (format is None and sys.stderr.isatty())
    handler = logging.StreamHandler() if is_console else LineHandler()
    handler.setFormatter(Console() if is_console else JsonLines())
    return handler


def _keep_queries_out() -> None:
    """Keep uvicorn from logging query strings, which may contain a token."""
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").addFilter(_remove_query)


def _remove_query(record: logging.LogRecord) -> bool:
    if '"WebSocket %s"' in str(record.msg) and isinstance(record.args, tuple):
        client, address, *others = record.args
        record.args = (client, str(address).partition("?")[0], *others)
    return True
