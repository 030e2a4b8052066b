"""Rules that firms write themselves over HTTP."""

import math
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from services.anomaly.domain import Severity
from services.anomaly.rules import RuleService, Wanted
from services.anomaly.tuning_api import TuningEntryOut, entry_out, key_of
from services.anomaly.tuning_messages import signal_id_at
from services.anomaly.tuning_store import StoredRule
from services.anomaly.tunings import HISTORY_S_MAX, RuleKind
from services.common.directory import Directory
from services.common.http import Authenticated

_SEVERITIES = {severity.name.lower(): severity for severity in Severity}


class RuleIn(BaseModel):
    """above, below: beyond `limit` for `delay_s`; over once back inside by `hysteresis`. rise, fall: changed by more than `limit`
    in `window_s`. no_data: nothing for `window_s`; `signal_id` of 0 is the whole machine."""

    model_config = ConfigDict(extra="forbid")

    machine_id: int
    signal_id: int = 0
    kind: RuleKind
    name: str
    severity: Annotated[str, Field(pattern="^(low|medium|high)$")] = "medium"
    limit: float = 0.0
    hysteresis: float = 0.0
    delay_s: int = 0
    window_s: int = 0


class RuleUpdateIn(RuleIn):
    """`version` that was looked at; 0: whatever it is now."""

    version: int = 0


class StopIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: str = ""


class PreviewIn(RuleIn):
    """`seconds` until now; 0 is a week."""

    seconds: Annotated[int, Field(ge=0, le=HISTORY_S_MAX)] = 0


class RuleOut(BaseModel):
    id: str
    version: int
    firm_id: int
    machine_id: int
    signal_id: int
    kind: RuleKind
    name: str
    severity: str
    limit: float
    hysteresis: float
    delay_s: int
    window_s: int
    enabled: bool
    made_us: int
    changed_us: int


class RuleList(BaseModel):
    rules: list[RuleOut]


class RuleDetail(BaseModel):
    rule: RuleOut
    history: list[TuningEntryOut]


class PreviewAlarmOut(BaseModel):
    started_us: int
    ended_us: int | None
    value: float | None


class PreviewOut(BaseModel):
    """`by_minute`: tried on the least or greatest value of each minute, as there are too many samples. The newest 100 alarms."""

    from_us: int
    to_us: int
    samples: int
    by_minute: bool
    count: int
    alarms: list[PreviewAlarmOut]


def router(rules: RuleService, directory: Directory) -> APIRouter:
    routes = APIRouter(prefix="/v1/rules", tags=["rules"])

    @routes.get("")
    async def list_rules(
        caller: Authenticated,
        firm_id: Annotated[int, Query(ge=0)] = 0,
        machine_id: Annotated[int, Query(ge=0)] = 0,
    ) -> RuleList:
        """Newest first."""
        found = await rules.list(caller, firm_id=firm_id, machine_id=machine_id)
        return RuleList(rules=[_rule(directory, one) for one in found])

    @routes.post("", status_code=201)
    async def create_rule(caller: Authenticated, body: RuleIn) -> RuleOut:
        """It holds from the next samples on."""
        return _rule(directory, await rules.create(caller, _wanted(body)))

    @routes.post("/preview")
    async def preview_rule(request: Request, caller: Authenticated, body: PreviewIn) -> PreviewOut:
        """What it would have raised on stored samples; keeps nothing."""
        found = await rules.preview(caller, key_of(request), _wanted(body), seconds=body.seconds)
        return PreviewOut(
            from_us=found.from_us,
            to_us=found.to_us,
            samples=found.samples,
            by_minute=found.by_minute,
            count=found.count,
            alarms=[
                PreviewAlarmOut(
                    started_us=alarm.started_us,
                    ended_us=alarm.ended_us,
                    value=alarm.value if math.isfinite(alarm.value) else None,
                )
                for alarm in found.alarms
            ],
        )

    @routes.get("/{rule_id}")
    async def get_rule(caller: Authenticated, rule_id: str) -> RuleDetail:
        """With everything that was done to it, newest first."""
        found, history = await rules.get(caller, rule_id)
        return RuleDetail(rule=_rule(directory, found), history=[entry_out(entry) for entry in history])

    @routes.put("/{rule_id}")
    async def update_rule(caller: Authenticated, rule_id: str, body: RuleUpdateIn) -> RuleOut:
        """Write a new version; an alarm of the version before ends. A stopped rule starts again."""
        return _rule(directory, await rules.change(caller, rule_id, _wanted(body), version=body.version))

    @routes.post("/{rule_id}/stop")
    async def stop_rule(caller: Authenticated, rule_id: str, body: StopIn) -> RuleOut:
        """Evaluate it no more."""
        return _rule(directory, await rules.stop(caller, rule_id, reason=body.reason))

    return routes


def _wanted(body: RuleIn) -> Wanted:
    fields = {name: getattr(body, name) for name in RuleIn.model_fields}
    return Wanted(**fields | {"severity": _SEVERITIES[body.severity]})


def _rule(directory: Directory, stored: StoredRule) -> RuleOut:
    rule = stored.rule
    return RuleOut(
        id=rule.id,
        version=rule.version,
        firm_id=rule.firm_id,
        machine_id=rule.machine_id,
        signal_id=signal_id_at(directory, rule.machine_id, rule.position),
        kind=rule.kind,
        name=rule.name,
        severity=rule.severity.name.lower(),
        limit=rule.limit,
        hysteresis=rule.hysteresis,
        delay_s=rule.delay_s,
        window_s=rule.window_s,
        enabled=stored.enabled,
        made_us=stored.made_us,
        changed_us=stored.changed_us,
    )
