"""The data-maturity self-assessment: dated questionnaires, how they are scored, and the need that follows from the answers.

A published questionnaire is never changed: a new one gets a new version and the date from which it is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

LEVELS = ("starting", "collecting", "using", "improving", "leading")
"""By the share of the points that were reached: below 20 %, 40 %, 60 %, 80 %, and from there."""
DRAFT_TOPICS_MAX = 2


class Topic(StrEnum):
    CAPTURE = "capture"
    STORAGE = "storage"
    USE = "use"
    PEOPLE = "people"
    SECURITY = "security"


@dataclass(frozen=True)
class Question:
    id: str
    topic: Topic
    text: str
    # Answer n is worth n points.
    answers: tuple[str, ...]

    @property
    def points_max(self) -> int:
        return len(self.answers) - 1


@dataclass(frozen=True, kw_only=True)
class Questionnaire:
    version: str
    valid_from: date
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Points of all questions and of each topic as a share 0..1; the level is that of the whole."""

    share: float
    level: str
    topics: Mapping[Topic, float]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """A firm's answers, as stored."""

    id: str
    firm_id: int
    version: str
    # Question to number of the answer.
    answers: Mapping[str, int]
    scoring: Scoring
    need_draft: str
    taken: datetime
    # Of the need that was opened from it.
    need_id: str = ""


_HELP = {
    Topic.CAPTURE: "capturing data from our machines: which signals, which sensors and gateways, and how to connect older machines",
    Topic.STORAGE: "keeping machine data in one place, named and time-stamped so that it can be found and trusted",
    Topic.USE: "using machine data to find causes of downtime, scrap or energy waste, with dashboards and simple models",
    Topic.PEOPLE: "training our people to read and use machine data in daily work",
    Topic.SECURITY: "securing machine data and connections: access rights, networks and backups",
}

QUESTIONNAIRES: tuple[Questionnaire, ...] = (
    Questionnaire(
        version="2026-1",
        valid_from=date(2026, 1, 1),
        questions=(
            Question(
                "machines_connected",
                Topic.CAPTURE,
                "How many of your important machines give data without anybody writing them down?",
                ("none", "a few", "about half", "nearly all"),
            ),
            Question(
                "data_by_hand",
                Topic.CAPTURE,
                "How are stops, scrap and output recorded?",
                ("not at all", "on paper", "typed into a computer", "by the machines themselves"),
            ),
            Question(
                "one_place",
                Topic.STORAGE,
                "Where are machine data kept?",
                ("nowhere", "in the machines", "in files of single people", "in one place for all"),
            ),
            Question(
                "history",
                Topic.STORAGE,
                "How far back can you look at a machine's data?",
                ("not at all", "days", "months", "years"),
            ),
            Question(
                "decisions",
                Topic.USE,
                "How often do data decide what is done in production?",
                ("never", "after a big problem", "every week", "every day"),
            ),
            Question(
                "forecast",
                Topic.USE,
                "What do you do with machine data?",
                ("nothing", "look at charts", "find causes of problems", "foresee problems and act before"),
            ),
            Question(
                "skills",
                Topic.PEOPLE,
                "Who can work with machine data?",
                ("nobody", "a supplier", "one of us", "several of us"),
            ),
            Question(
                "time_for_it",
                Topic.PEOPLE,
                "Is there time set aside for it?",
                ("no", "now and then", "some hours a week", "it is somebody's job"),
            ),
            Question(
                "access",
                Topic.SECURITY,
                "Who can get at machines and data from outside?",
                ("we do not know", "suppliers as they like", "suppliers when we let them", "named people, logged"),
            ),
            Question(
                "backup",
                Topic.SECURITY,
                "What happens when a controller or a computer in production breaks?",
                ("we would start anew", "old copies somewhere", "regular copies", "regular copies, tried out"),
            ),
        ),
    ),
)


def questionnaire_on(day: date) -> Questionnaire:
    """The one that is asked on that day."""
    return max((each for each in QUESTIONNAIRES if each.valid_from <= day), key=lambda each: each.valid_from)


def questionnaire_of(version: str) -> Questionnaire | None:
    return next((each for each in QUESTIONNAIRES if each.version == version), None)


def score(questionnaire: Questionnaire, answers: Mapping[str, int]) -> Scoring:
    """Every question counts the same, whatever its number of answers; so does every question within its topic."""
    shares = {question: answers[question.id] / question.points_max for question in questionnaire.questions}
    topics = {
        topic: _mean([share for question, share in shares.items() if question.topic is topic])
        for topic in Topic
        if any(question.topic is topic for question in shares)
    }
    share = _mean(list(shares.values()))
    return Scoring(share=share, level=level_of(share), topics=topics)


def level_of(share: float) -> str:
    return LEVELS[min(int(share * len(LEVELS) + 1e-9), len(LEVELS) - 1)]


def need_draft(scoring: Scoring) -> str:
    """What a firm with these answers might ask for: help with its weakest topics. Empty where nothing is weak."""
    weakest = sorted(scoring.topics.items(), key=lambda each: (each[1], each[0]))
    weak = [topic for topic, share in weakest if share < 1][:DRAFT_TOPICS_MAX]
    if not weak:
        return ""
    return f"We are {_ARTICLES[scoring.level]} with machine data and want help with {', and '.join(_HELP[each] for each in weak)}."


_ARTICLES = {
    "starting": "only starting",
    "collecting": "collecting some data",
    "using": "using data in places",
    "improving": "well on our way",
    "leading": "far along",
}


def _mean(shares: Sequence[float]) -> float:
    return round(sum(shares) / len(shares), 6)
