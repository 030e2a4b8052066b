"""Notes in the change log what comes by HTTP."""

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.audit import BODY_BYTES_MAX, ChangeLog, changes_by_http, ids_in, ids_in_json
from services.common.gate import Gate


class Noting:
    """A layer of the application, inside the one that binds the correlation id: an answer leaves once its entry is kept."""

    def __init__(self, app: ASGIApp, changes: ChangeLog, gate: Gate) -> None:
        self._app = app
        self._changes = changes
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not changes_by_http(scope["method"]):
            await self._app(scope, receive, send)
            return
        asked = bytearray()
        held: Message | None = None

        async def receiving() -> Message:
            message = await receive()
            if len(asked) <= BODY_BYTES_MAX:
                asked.extend(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                held = message
                return
            if held is not None:
                start, held = held, None
                answer = message.get("body", b"")
                await self._note(scope, bytes(asked), answer, _outcome(start["status"], answer))
                await send(start)
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except Exception:
            await self._note(scope, bytes(asked), b"", "BROKEN_OFF")
            raise

    async def _note(self, scope: Scope, asked: bytes, answer: bytes, outcome: str) -> None:
        caller = scope.get("state", {}).get("caller")
        if caller is None:
            return  # nobody that we know
        route = getattr(scope.get("route"), "path", "")
        in_path = {name: _whole(value) for name, value in scope.get("path_params", {}).items()}
        made = ids_in_json(answer) if outcome == "OK" else {}
        await self._changes.note(
            caller,
            shown=self._gate.shown(caller),
            action=f"{scope['method']} {route}",
            ids=made | ids_in_json(asked) | ids_in(in_path.items()),
            outcome=outcome,
            address=scope["client"][0] if scope.get("client") else "",
        )


def _outcome(status: int, answer: bytes) -> str:
    if status < 400:
        return "OK"
    try:
        return str(json.loads(answer)["reason"])[:64]
    except (ValueError, KeyError, TypeError):
        return str(status)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value
