"""Scoring of the self-assessment, and small groups in the fairness report."""

from datetime import date

import pytest

from services.matching.fairness import GROUP_MIN, GroupFigures, without_small_groups
from services.matching.maturity import (
    LEVELS,
    QUESTIONNAIRES,
    Topic,
    level_of,
    need_draft,
    questionnaire_of,
    questionnaire_on,
    score,
)

FIRST = QUESTIONNAIRES[0]


def test_no_answer_and_every_answer_are_the_ends_of_the_scale() -> None:
    lowest = score(FIRST, {question.id: 0 for question in FIRST.questions})
    highest = score(FIRST, {question.id: question.points_max for question in FIRST.questions})
    assert (lowest.share, lowest.level) == (0, "starting")
    assert (highest.share, highest.level) == (1, "leading")
    assert set(lowest.topics) == set(Topic)
    assert need_draft(highest) == ""


@pytest.mark.parametrize(
    ("share", "level"),
    [(0, 0), (0.1999, 0), (0.2, 1), (0.4, 2), (0.5999, 2), (0.6, 3), (0.7999, 3), (0.8, 4), (1, 4)],
)
def test_each_level_begins_at_its_fifth(share: float, level: int) -> None:
    assert level_of(share) == LEVELS[level]


def test_the_draft_asks_for_help_with_the_two_weakest_topics() -> None:
    answers = {question.id: question.points_max for question in FIRST.questions}
    answers |= {"skills": 0, "time_for_it": 0, "history": 1}
    scoring = score(FIRST, answers)
    assert scoring.topics[Topic.PEOPLE] == 0
    draft = need_draft(scoring)
    assert "training our people" in draft
    assert "keeping machine data in one place" in draft
    assert "capturing" not in draft


def test_questionnaires_are_dated_different_and_well_formed() -> None:
    assert len({each.version for each in QUESTIONNAIRES}) == len(QUESTIONNAIRES)
    assert questionnaire_on(date(2026, 6, 1)).version == FIRST.version
    assert questionnaire_of("nonsense") is None
    for each in QUESTIONNAIRES:
        assert len({question.id for question in each.questions}) == len(each.questions)
        assert all(question.points_max >= 1 for question in each.questions)


def test_small_groups_are_left_out_and_never_one_alone() -> None:
    def group(name: str, needs: int) -> GroupFigures:
        return GroupFigures(group=name, needs=needs, matched_share=0.5)

    shown = without_small_groups([group("micro", GROUP_MIN), group("small", 40), group("large", GROUP_MIN - 1)])
    assert [(each.group, each.needs, each.matched_share) for each in shown] == [
        ("micro", None, None),  # could be had by difference
        ("small", 40, 0.5),
        ("large", None, None),
    ]
    both = without_small_groups([group("micro", 1), group("small", 40), group("large", 2)])
    assert [each.needs for each in both] == [None, 40, None]
    assert [each.needs for each in without_small_groups([group("micro", 9), group("small", 40)])] == [9, 40]
    assert without_small_groups([]) == []
