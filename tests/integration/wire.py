"""A way to the database that can be cut and mended."""

import asyncio
import contextlib

import httpx


class Wire:
    """A port of this machine behind which the database is."""

    def __init__(self, dsn: str) -> None:
        self._far = httpx.URL(dsn)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def dsn(self) -> str:
        """How the database is reached through it, once it has been mended."""
        return str(self._far.copy_with(host="127.0.0.1", port=self.port))

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._far.host, self._far.port or 5432)
        self._open |= {writer, far_writer}

        async def pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    to.write(data)
                    await to.drain()
            to.transport.abort()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
