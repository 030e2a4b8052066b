"""HTTP edge of the table of machines."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from services.common.errors import Invalid
from services.common.http import Authenticated
from services.ingest.registry import machinetable
from services.ingest.registry.imports import Imported, Imports

CSV = "text/csv; charset=utf-8"


def import_router(imports: Imports) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["table of machines"])

    @router.get("/templates/machines.csv")
    async def template(caller: Authenticated) -> Response:
        """An empty table with an example."""
        return _csv(machinetable.template(), "machines-template.csv")

    @router.get("/firms/{firm_id}/machines.csv")
    async def export(firm_id: int, caller: Authenticated) -> Response:
        """The firm's machines and signals in the form that can be imported."""
        return _csv(await imports.export(caller, firm_id), "machines.csv")

    @router.post("/firms/{firm_id}/machines.csv")
    async def import_(firm_id: int, request: Request, caller: Authenticated, preview: bool = False) -> Response:
        """Import a table: one line a signal, the columns of the template, at most 20,000 lines and 4 MiB.

        The answer says of each line what became of it: create, change, same or refuse with the reason. With `preview=true`
        nothing is changed. 200: done (or, for a preview, it would be); 422: a line is refused, and nothing was changed.
        """
        if "multipart" in request.headers.get("content-type", ""):
            raise Invalid("Send the file as the body itself (curl --data-binary @machines.csv).", reason="BAD_TABLE")
        body = await request.body()
        return _said(await imports.run(caller, firm_id, body, is_preview=preview), preview)

    return router


def _csv(text: str, name: str) -> Response:
    return Response(text, media_type=CSV, headers={"Content-Disposition": f'attachment; filename="{name}"'})


def _said(imported: Imported, is_preview: bool) -> Response:
    plan = imported.plan
    refused = plan.count(machinetable.REFUSE)
    answer: dict[str, Any] = {
        "preview": is_preview,
        "applied": imported.is_applied,
        "machines_created": sum(not machine.id for machine in plan.machines),
        "machines_changed": sum(bool(machine.id) for machine in plan.machines),
        "signals_created": sum(len(machine.new_signals) for machine in plan.machines),
        "signals_changed": sum(len(machine.changed_signals) for machine in plan.machines),
        "lines_refused": refused,
        "lines": [
            {
                "line": one.line,
                "machine": one.machine,
                "signal": one.signal,
                "action": one.action,
                "reason": one.reason,
                "detail": one.detail,
            }
            for one in plan.outcomes
        ],
    }
    if not refused:
        return Response(orjson.dumps(answer), media_type="application/json")
    detail = f"{refused} lines are refused, nothing was changed; mend them and import the table again."
    answer |= {"status": 422, "reason": "IMPORT_REFUSED", "detail": detail}
    return Response(orjson.dumps(answer), status_code=422, media_type="application/json")
