"""Ratings, thresholds, changed sensors and the evidence of alarms over HTTP."""

import math
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from services.anomaly.alarm_out import AlarmOut, alarm_out
from services.anomaly.evidence import MINUTES_MAX, Evidence, EvidenceService, picture
from services.anomaly.tuning import ThresholdNow, TuningService
from services.anomaly.tuning_messages import threshold_message
from services.anomaly.tuning_store import Threshold, TuningEntry
from services.common.directory import Directory
from services.common.http import Authenticated
from services.common.identity import bearer_key

SVG = "image/svg+xml"


class RatingIn(BaseModel):
    """`useful` of null takes back what was said."""

    model_config = ConfigDict(extra="forbid")

    useful: bool | None
    comment: str = ""


class ResetIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    comment: str = ""


class RelearnIn(BaseModel):
    """`signal_id` of 0: every signal of the machine."""

    model_config = ConfigDict(extra="forbid")

    machine_id: int
    signal_id: int = 0
    reason: str


class ThresholdOut(BaseModel):
    """`offset` is in powers of ten of how rare a score must be: above 0 fewer alarms, below 0 more."""

    firm_id: int
    machine_id: int
    machine_path: str
    signal_id: int
    signal_name: str
    offset: float
    offset_min: float
    offset_max: float
    useful: int
    not_useful: int


class TuningEntryOut(BaseModel):
    cause: str
    threshold_offset: float | None
    alarm_id: str
    reason: str
    made_us: int
    actor: str
    credential_id: int


class ThresholdNowOut(BaseModel):
    """`useful` is what was said of this alarm; the history is newest first."""

    threshold: ThresholdOut
    useful: bool | None
    history: list[TuningEntryOut]


class ThresholdList(BaseModel):
    thresholds: list[ThresholdOut]


class TuningList(BaseModel):
    tunings: list[TuningEntryOut]


class TrackOut(BaseModel):
    """Times and values, or (by_minute) starts of minutes with the least and greatest value in each."""

    signal_id: int
    signal_name: str
    unit: str
    share: float
    by_minute: bool
    times_us: list[int]
    values: list[float]
    least: list[float]
    greatest: list[float]


class EvidenceOut(BaseModel):
    alarm: AlarmOut
    figures: dict[str, float]
    from_us: int
    to_us: int
    tracks: list[TrackOut]
    samples_missing: str


def router(tuning: TuningService, evidence: EvidenceService, directory: Directory) -> APIRouter:
    """Comes before the alarms' own routes, whose ids would take these names."""
    routes = APIRouter(prefix="/v1/alarms", tags=["alarms"])

    @routes.get("/thresholds")
    async def list_thresholds(caller: Authenticated, firm_id: int = 0, machine_id: int = 0) -> ThresholdList:
        """Thresholds that people have moved."""
        found = await tuning.thresholds(caller, firm_id=firm_id, machine_id=machine_id)
        return ThresholdList(thresholds=[_threshold(directory, one) for one in found])

    @routes.get("/tunings")
    async def list_tunings(caller: Authenticated, machine_id: int, signal_id: int) -> TuningList:
        """What people have done to the learning and the threshold of a signal, newest first."""
        found = await tuning.history(caller, machine_id=machine_id, signal_id=signal_id)
        return TuningList(tunings=[entry_out(entry) for entry in found])

    @routes.post("/relearn", status_code=204)
    async def relearn_sensor(caller: Authenticated, body: RelearnIn) -> None:
        """A sensor was changed, a machine overhauled: what is usual is learnt anew from the next samples on."""
        await tuning.relearn(caller, machine_id=body.machine_id, signal_id=body.signal_id, reason=body.reason)

    @routes.post("/{alarm_id}/rating")
    async def rate_alarm(caller: Authenticated, alarm_id: str, body: RatingIn) -> ThresholdNowOut:
        """Say whether it was useful; its signal's threshold moves a little, within bounds, for the samples to come."""
        return _now(directory, await tuning.rate(caller, alarm_id, useful=body.useful, comment=body.comment))

    @routes.get("/{alarm_id}/threshold")
    async def get_threshold(caller: Authenticated, alarm_id: str) -> ThresholdNowOut:
        """Where the threshold of the alarm's signal is, and how it came there."""
        return _now(directory, await tuning.threshold(caller, alarm_id))

    @routes.post("/{alarm_id}/threshold/reset")
    async def reset_threshold(caller: Authenticated, alarm_id: str, body: ResetIn) -> ThresholdNowOut:
        """Put it back to where the detector has it by itself."""
        return _now(directory, await tuning.reset(caller, alarm_id, comment=body.comment))

    @routes.get("/{alarm_id}/explain")
    async def explain_alarm(
        request: Request,
        caller: Authenticated,
        alarm_id: str,
        minutes: Annotated[int, Query(ge=0, le=MINUTES_MAX)] = 0,
    ) -> EvidenceOut:
        """The samples around it, what fired and its figures: enough to draw it."""
        return _evidence(await evidence.evidence(caller, key_of(request), alarm_id, minutes=minutes))

    @routes.get("/{alarm_id}/picture", response_class=Response, responses={200: {"content": {SVG: {}}}})
    async def draw_alarm(
        request: Request,
        caller: Authenticated,
        alarm_id: str,
        minutes: Annotated[int, Query(ge=0, le=MINUTES_MAX)] = 0,
    ) -> Response:
        """The same as a picture (SVG)."""
        found = await evidence.evidence(caller, key_of(request), alarm_id, minutes=minutes)
        return Response(picture(found), media_type=SVG, headers={"Content-Security-Policy": "default-src 'none'"})

    return routes


def key_of(request: Request) -> str:
    """The caller's key, to ask ingest with it."""
    return bearer_key(request.headers.get("authorization", ""))


def entry_out(entry: TuningEntry) -> TuningEntryOut:
    fields = asdict(entry)
    del fields["kind"]
    return TuningEntryOut(**fields)


def _threshold(directory: Directory, threshold: Threshold) -> ThresholdOut:
    message = threshold_message(directory, threshold)
    return ThresholdOut(**{name: getattr(message, name) for name in ThresholdOut.model_fields})


def _now(directory: Directory, now: ThresholdNow) -> ThresholdNowOut:
    return ThresholdNowOut(
        threshold=_threshold(directory, now.threshold),
        useful=now.useful,
        history=[entry_out(entry) for entry in now.history],
    )


def _evidence(found: Evidence) -> EvidenceOut:
    return EvidenceOut(
        alarm=alarm_out(found.alarm),
        figures={name: value for name, value in found.alarm.figures if math.isfinite(value)},
        from_us=found.from_us,
        to_us=found.to_us,
        tracks=[
            TrackOut(
                signal_id=track.signal_id,
                signal_name=track.name,
                unit=track.unit,
                share=track.share,
                by_minute=track.by_minute,
                times_us=track.times_us.tolist(),
                values=[] if track.by_minute else track.least.tolist(),
                least=track.least.tolist() if track.by_minute else [],
                greatest=track.greatest.tolist() if track.by_minute else [],
            )
            for track in found.tracks
        ],
        samples_missing=found.samples_missing,
    )
