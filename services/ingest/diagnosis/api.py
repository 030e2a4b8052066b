"""HTTP edge of "why is there no data?"."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from services.common.http import Authenticated
from services.ingest.diagnosis.causes import Diagnosis, Facts
from services.ingest.diagnosis.diagnosis import Diagnoses


def diagnosis_router(diagnoses: Diagnoses) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["diagnosis"])

    @router.get("/machines/{machine_id}/diagnosis")
    async def diagnosis(machine_id: int, caller: Authenticated) -> dict[str, Any]:
        """Why is there no data? The most likely cause in plain words with the next step, and what it is concluded from.

        `verdict` is stable: FLOWING, PARTLY_REFUSED, NOT_STORED_YET, NEVER_SENT, GATEWAY_SILENT, MACHINE_SILENT, CLOCK_AHEAD,
        CLOCK_BEHIND, WRONG_TIME_UNIT, NO_VALID_KEY, MESSAGE_LOG_AWAY, or the reason of the refusal. Times: microseconds since 1970
        UTC, null: never.
        """
        return _said(*await diagnoses.of_machine(caller, machine_id))

    @router.get("/refusals")
    async def refusals(
        caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = ""
    ) -> dict[str, Any]:
        """What the doors refused or put aside, one row for each kind, newest first; operators see keys of nobody too."""
        found, token = await diagnoses.refusals(caller, firm_id, page_size, page_token)
        return {"refusals": [{"firm_id": firm} | asdict(one) for firm, one in found], "next_page_token": token}

    return router


def _said(facts: Facts, diagnosis: Diagnosis) -> dict[str, Any]:
    verdict = diagnosis.verdict
    return {
        "machine_id": facts.machine_id,
        "path": facts.path,
        "verdict": verdict.cause,
        "text": verdict.text,
        "next_step": verdict.next_step,
        "causes": [asdict(cause) for cause in diagnosis.causes],
        "last_received_us": facts.received_us or None,
        "last_received_time_us": facts.newest_us or None,
        "last_stored_time_us": facts.stored_us or None,
        "waiting_records": facts.waiting_records,
        "source": facts.source,
        "signals": [
            {
                "signal_id": one.id,
                "name": one.name,
                "unit": one.unit,
                "last_us": one.last_us or None,
                "value": one.value,
            }
            for one in facts.signals
        ],
        "credentials": [
            {
                "credential_id": key.id,
                "prefix": key.prefix,
                "label": key.label,
                "state": key.state(facts.now_us),
                "valid_from_us": key.valid_from_us,
                "valid_to_us": key.valid_to_us or None,
                "last_used_us": key.used_us or None,
            }
            for key in facts.keys
        ],
    }
