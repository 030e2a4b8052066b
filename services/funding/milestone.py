"""Milestones: a figure of the firm's own machines that the project has to reach, shown by signed evidence; or a document."""

import re
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from services.funding.domain import TITLE_CHARACTERS_MAX, Refused, checked_text, uk_day, uk_time

MILESTONES_MAX = 20
REFERENCE_CHARACTERS_MAX = 500
DAYS_MAX = 3_660
DOCUMENTS_MAX = 20
# Where an operator names none.
COVERAGE_MIN = "0.9"
ID = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")


class Comparison(StrEnum):
    AT_LEAST = "at_least"
    AT_MOST = "at_most"


@dataclass(frozen=True, kw_only=True)
class Milestone:
    """Met once a signed figure of `measure` over `days_min` days within the project, with data for at least `coverage_min` of the
    time, is on the right side of the threshold. Without a measure: once an operator has confirmed the firm's document."""

    id: str
    title: str
    due: date
    # As the hub measures it: energy_kwh, working_hours, samples and the like.
    measure: str = ""
    # None: any machine of the firm.
    machine_id: int | None = None
    comparison: Comparison | None = None
    threshold: str = ""
    days_min: int = 0
    coverage_min: str = ""
    # Once it is met.
    met_us: int | None = None
    value: str = ""
    statement_id: str = ""
    # The newest that the firm has sent: where it is kept, and what it is.
    document: str = ""
    document_sha256: str = ""
    document_sent_us: int | None = None

    @property
    def is_measured(self) -> bool:
        return bool(self.measure)

    @property
    def as_set(self) -> "Milestone":
        """Without what was shown since."""
        return replace(
            self,
            met_us=None,
            value="",
            statement_id="",
            document="",
            document_sha256="",
            document_sent_us=None,
        )


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a verified statement says."""

    measure: str
    firm_id: int
    machine_id: int
    from_: datetime
    to: datetime
    value: str
    unit: str
    coverage: str


def checked_milestone(milestone: Milestone) -> Milestone:
    """Raises Refused when a field makes no sense."""
    if not ID.fullmatch(milestone.id):
        raise Refused(
            "milestones: an id has 1 to 40 lower case letters, digits, - or _, a letter first.", "MILESTONE_INVALID"
        )
    checked_text("milestones.title", milestone.title, TITLE_CHARACTERS_MAX)
    if not milestone.is_measured:
        if milestone != Milestone(id=milestone.id, title=milestone.title, due=milestone.due):
            raise Refused(
                f"{milestone.id}: what is shown by a document has no figures; name a measure or leave them out.",
                "MILESTONE_INVALID",
            )
        return milestone
    checked_text("milestones.measure", milestone.measure, 60)
    if milestone.comparison is None:
        raise Refused(f"{milestone.id}: comparison is at_least or at_most.", "COMPARISON_MISSING")
    if not _DECIMAL.fullmatch(milestone.threshold):
        raise Refused(f"{milestone.id}: threshold is a decimal number such as 1532.25.", "MILESTONE_INVALID")
    if not 1 <= milestone.days_min <= DAYS_MAX:
        raise Refused(f"{milestone.id}: days_min is from 1 to {DAYS_MAX}.", "MILESTONE_INVALID")
    if not _DECIMAL.fullmatch(milestone.coverage_min) or not 0 <= Decimal(milestone.coverage_min) <= 1:
        raise Refused(f"{milestone.id}: coverage_min is a decimal number from 0 to 1.", "MILESTONE_INVALID")
    return milestone


def checked_document(reference: str, sha256: str) -> tuple[str, str]:
    """Raises Refused when they cannot be stored or name no file."""
    if not _SHA256.fullmatch(sha256):
        raise Refused("sha256 of the document has 64 hexadecimal digits, lower case.", "SHA256_INVALID")
    return checked_text("reference", reference, REFERENCE_CHARACTERS_MAX), sha256


def _by_the_clock(figure: Figure) -> timedelta:
    """From midnight to midnight in the United Kingdom: the week in which summer time begins is an hour short, and is a week."""
    return uk_time(figure.to).replace(tzinfo=None) - uk_time(figure.from_).replace(tzinfo=None)


def check_shown(milestone: Milestone, figure: Figure, *, firm_id: int, start: date, end: date) -> None:
    """Raises Refused with the first thing that keeps the figure from showing the milestone; equal to the threshold is enough."""

    def refuse(text: str, reason: str) -> None:
        raise Refused(f"{milestone.id}: {text}", reason)

    if figure.firm_id != firm_id:
        refuse("the evidence is about another firm.", "EVIDENCE_OTHER_FIRM")
    if milestone.machine_id not in (None, figure.machine_id):
        refuse(f"the evidence is about machine {figure.machine_id}.", "EVIDENCE_OTHER_MACHINE")
    if figure.measure != milestone.measure:
        refuse(f"the evidence is of {figure.measure}, not {milestone.measure}.", "EVIDENCE_OTHER_MEASURE")
    # The last instant of the range is not part of it.
    first, last = uk_day(figure.from_), uk_day(figure.to - timedelta(microseconds=1))
    if first < start or last > end:
        refuse(f"the evidence has to lie within the project, {start} to {end}.", "EVIDENCE_OUTSIDE_PROJECT")
    if max(figure.to - figure.from_, _by_the_clock(figure)) < timedelta(days=milestone.days_min):
        refuse(f"the evidence has to span at least {milestone.days_min} days.", "EVIDENCE_TOO_SHORT")
    if Decimal(figure.coverage) < Decimal(milestone.coverage_min):
        refuse(
            f"data stand for {figure.coverage} of the time; {milestone.coverage_min} is needed.", "EVIDENCE_TOO_THIN"
        )
    value, threshold = Decimal(figure.value), Decimal(milestone.threshold)
    met = value >= threshold if milestone.comparison is Comparison.AT_LEAST else value <= threshold
    if not met:
        words = str(milestone.comparison).replace("_", " ")
        refuse(
            f"the figure is {figure.value} {figure.unit}; {words} {milestone.threshold} is needed.", "MILESTONE_NOT_MET"
        )
