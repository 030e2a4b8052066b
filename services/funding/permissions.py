"""Who may do what with an application in which state: one table, which the use cases ask and the pages show."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import Conflict
from services.common.identity import Caller, Role
from services.funding.domain import Application, ApplicationState


class Action(StrEnum):
    ADD_PLEDGE = "add_pledge"
    CONFIRM_PLEDGE = "confirm_pledge"
    TAKE_PLEDGE_BACK = "take_pledge_back"
    SUBMIT = "submit"
    WITHDRAW = "withdraw"
    REPLACE_MATCH = "replace_match"
    INVITE_ASSESSORS = "invite_assessors"
    TAKE_ASSESSOR_BACK = "take_assessor_back"
    MODERATE = "moderate"
    ACCEPT_REVIEW = "accept_review"
    SCORE = "score"
    WAIVE_RATIO = "waive_ratio"
    DECIDE = "decide"


@dataclass(frozen=True)
class May:
    """Firms for their own applications only, partners for what their experts were invited to, assessors
    for what they were invited to themselves."""

    roles: tuple[Role, ...]
    states: tuple[ApplicationState, ...]


_DRAFT, _SUBMITTED = ApplicationState.DRAFT, ApplicationState.SUBMITTED

TABLE: Mapping[Action, May] = {
    Action.ADD_PLEDGE: May((Role.FIRM, Role.OPERATOR), (_DRAFT, _SUBMITTED)),
    Action.CONFIRM_PLEDGE: May((Role.OPERATOR,), (_DRAFT, _SUBMITTED)),
    Action.TAKE_PLEDGE_BACK: May((Role.FIRM, Role.OPERATOR), (_DRAFT, _SUBMITTED)),
    Action.SUBMIT: May((Role.FIRM, Role.OPERATOR), (_DRAFT,)),
    Action.WITHDRAW: May((Role.FIRM, Role.OPERATOR), (_DRAFT, _SUBMITTED)),
    Action.REPLACE_MATCH: May((Role.OPERATOR,), (_DRAFT, _SUBMITTED)),
    Action.INVITE_ASSESSORS: May((Role.OPERATOR,), (_SUBMITTED,)),
    Action.TAKE_ASSESSOR_BACK: May((Role.OPERATOR,), (_SUBMITTED,)),
    Action.MODERATE: May((Role.OPERATOR,), (_SUBMITTED,)),
    Action.ACCEPT_REVIEW: May((Role.PARTNER, Role.ASSESSOR), (_SUBMITTED,)),
    Action.SCORE: May((Role.PARTNER, Role.ASSESSOR), (_SUBMITTED,)),
    Action.WAIVE_RATIO: May((Role.OPERATOR,), (_SUBMITTED,)),
    Action.DECIDE: May((Role.OPERATOR,), (_SUBMITTED,)),
}


def check_may(caller: Caller, application: Application, action: Action) -> None:
    """Raises Forbidden for another role, Conflict in another state."""
    may = TABLE[action]
    caller.require(*may.roles)
    if application.state not in may.states:
        raise Conflict(
            f"The application is {application.state}; this is for one that is {' or '.join(may.states)}.",
            reason=f"APPLICATION_{application.state.upper()}",
        )


def allowed(caller: Caller, application: Application) -> list[Action]:
    """What the caller may do now; a call that is closed, or a rule, may still say no."""
    return [action for action, may in TABLE.items() if caller.role in may.roles and application.state in may.states]
