"""Values into messages and numbers into words, by name."""

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum

import pytest

from services.common.messages import message_of, number_of, prefix_of, word_of
from services.matching.matches import Match, MatchState, Result, Score, Side
from smdih.matching.v1 import events_pb2, matching_pb2, maturity_pb2


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
