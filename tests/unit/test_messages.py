"""Values into messages and numbers into words, by name."""

from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any

import pytest

from services.anomaly import delivery, measures
from services.anomaly import domain as anomaly
from services.common.messages import message_of, number_of, prefix_of, word_of
from services.funding.change_requests import ChangeKind, ChangeState
from services.funding.domain import ProposalState
from services.funding.impact import ImpactKind
from services.funding.milestone import Comparison
from services.funding.permissions import Action
from services.funding.rules.size import Relation
from services.matching.matches import Match, MatchState, Result, Score, Side
from services.matching.maturity import Topic
from services.matching.notices import NoticeKind
from services.matching.rounds import RoundState
from smdih.anomaly.v1 import anomaly_pb2, notification_pb2
from smdih.anomaly.v1 import events_pb2 as anomaly_events_pb2
from smdih.funding.v1 import allocation_pb2, change_pb2, funding_pb2, group_pb2, impact_pb2, milestone_pb2
from smdih.matching.v1 import events_pb2, matching_pb2, maturity_pb2, notices_pb2, rounds_pb2


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Answered:
    id: str = "a1"
    firm_id: int = 7
    version: str = "2026-1"
    answers: dict[str, int] = field(default_factory=lambda: {"backup": 2})
    share: float = 0.5
    level: str = "using"
    topics: tuple[maturity_pb2.TopicShare, ...] = ()
    need_draft: str = ""
    taken_us: int = 5
    need_id: str | None = None


def test_fields_come_from_attributes_of_the_same_name() -> None:
    score = Score(side=Side.PARTNER, points=4, comment="good", scored=datetime(1970, 1, 2, tzinfo=UTC))
    match = Match(
        id="m",
        need_id="n",
        offer_id="o",
        firm_id=1,
        provider_id="p",
        partner_id=2,
        quarter=date(2026, 10, 1),
        accepted=datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
        accepted_by=3,
        correlation_id="c",
        engage_by=None,
        state=MatchState.FINISHED,
        result=Result.NOT_SOLVED,
        scores=(score,),
    )
    made = message_of(matching_pb2.Match, match, end_reason="given goes first")
    assert made == matching_pb2.Match(
        id="m",
        need_id="n",
        offer_id="o",
        firm_id=1,
        provider_id="p",
        partner_id=2,
        quarter="2026-10-01",
        accepted_us=1_000_000,
        correlation_id="c",
        state=matching_pb2.MATCH_STATE_FINISHED,
        result=events_pb2.RESULT_NOT_SOLVED,
        end_reason="given goes first",
        scores=[
            matching_pb2.MatchScore(side=matching_pb2.SIDE_PARTNER, points=4, comment="good", scored_us=86_400_000_000)
        ],
    )


def test_a_map_is_carried_over_and_what_is_none_is_not_set() -> None:
    made = message_of(maturity_pb2.Assessment, Answered(), level=None)
    assert (dict(made.answers), made.taken_us, made.level, made.need_id) == ({"backup": 2}, 5, "", "")


def test_a_field_that_nobody_gives_is_an_error_of_ours() -> None:
    with pytest.raises(AttributeError):
        message_of(matching_pb2.ScorePart, Answered())


def test_words_and_numbers_belong_together_by_name() -> None:
    for state in MatchState:
        assert word_of(MatchState, matching_pb2.MatchState, number_of(matching_pb2.MatchState, state)) is state
    assert [word_of(MatchState, matching_pb2.MatchState, number) for number in (0, 99, -1)] == [None] * 3
    assert prefix_of(matching_pb2.MatchState) == "MATCH_STATE_"
    with pytest.raises(KeyError):
        number_of(matching_pb2.MatchState, Colour.RED)


@pytest.mark.parametrize(
    ("kind", "value", "given"),
    [
        (notification_pb2.Contact, delivery.Contact, set()),
        (notification_pb2.Escalation, delivery.Escalation, set()),
        (notification_pb2.EscalationStep, delivery.Step, set()),
        (notification_pb2.Delivery, delivery.Delivery, set()),
        (anomaly_pb2.AlarmHistoryEntry, anomaly.HistoryEntry, set()),
        (anomaly_pb2.MaintenanceWindow, anomaly.MaintenanceWindow, set()),
        (anomaly_pb2.Suppression, anomaly.Source, {"out_of_service"}),
        (anomaly_pb2.GetAlarmMeasuresResponse, measures.Measures, {"low", "medium", "high"}),
        (anomaly_pb2.AlarmSourceMeasure, measures.SourceMeasure, set()),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_every_field_of_a_message_has_its_attribute(kind: Any, value: Any, given: set[str]) -> None:
    """What the type checker would say if the edge wrote every field out."""
    known = {each.name for each in fields(value)} | given
    missing = {each.name for each in kind.DESCRIPTOR.fields if not {each.name, each.name.removesuffix("_us")} & known}
    assert missing == set()


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (anomaly.Change, anomaly_events_pb2.AlarmChange),
        (delivery.ContactKind, notification_pb2.ContactKind),
        (delivery.DeliveryState, notification_pb2.DeliveryState),
        (Result, events_pb2.Result),
        (Topic, maturity_pb2.Topic),
        (NoticeKind, notices_pb2.NoticeKind),
        (RoundState, rounds_pb2.RoundState),
        (Relation, group_pb2.FirmRelation),
        (ImpactKind, impact_pb2.ImpactKind),
        (ChangeKind, change_pb2.ChangeKind),
        (ChangeState, change_pb2.ChangeState),
        (Comparison, milestone_pb2.Comparison),
        (ProposalState, allocation_pb2.ProposalState),
        (Action, funding_pb2.ApplicationAction),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_every_word_has_its_number_and_every_number_its_word(words: Any, numbers: Any) -> None:
    assert {number_of(numbers, word) for word in words} == set(numbers.values()) - {0}
