"""A TCP relay to PostgreSQL that simulates network failures."""

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlencode

from psycopg.conninfo import conninfo_to_dict


class Relay:
    """Relays connections to `url`. `refusing` closes new ones at once; `accepted` gets an item for each connection."""

    def __init__(self, url: str) -> None:
        self._target = conninfo_to_dict(url)
        self.refusing = False
        self.accepted = asyncio.Queue[None]()
        self._open: list[tuple[asyncio.Event, asyncio.StreamWriter, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        query = urlencode({**self._target, "host": "127.0.0.1", "port": port})
        self.url = f"postgresql://?{query}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.drop()

    def hang(self) -> None:
        """Forward no more data on the open connections, without closing them."""
        for flowing, *_ in self._open:
            flowing.clear()

    def drop(self) -> None:
        """Close the open connections."""
        for flowing, *writers in self._open:
            for writer in writers:
                writer.close()
            flowing.set()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.close()
            return
        host, port = str(self._target["host"]), self._target.get("port") or 5432
        server = (
            await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            if host.startswith("/")
            else await asyncio.open_connection(host, int(port))
        )
        flowing = asyncio.Event()
        flowing.set()
        self._open.append((flowing, writer, server[1]))
        self.accepted.put_nowait(None)
        await asyncio.gather(self._copy(reader, server[1], flowing), self._copy(server[0], writer, flowing))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        with suppress(OSError, RuntimeError):
            while data := await source.read(65536):
                await flowing.wait()
                target.write(data)
                await target.drain()
        target.close()
