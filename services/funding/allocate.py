"""Decide one call in a process of its own: `python -m services.funding.allocate PARAMETERS_VERSION`, input on standard input.

The solver is large and works on one core for a second: neither its memory nor its time is the service's. Writes the certificate;
exit code 3 and the reason where nothing can be decided.
"""

import json
import sys
from datetime import datetime
from fractions import Fraction
from typing import Any

from services.funding.allocation import AllocationInfeasible, AllocationUnproven, allocate
from services.funding.rules.exact import InvalidFact
from services.funding.selection import Application, Call, Method, Quota

REFUSED = 3


def call_of(given: dict[str, Any]) -> Call:
    return Call(
        id=given["id"],
        budget_p=given["budget_p"],
        threshold=Fraction(given["threshold"]),
        method=Method(given["method"]),
        quotas=tuple(
            Quota(
                pot=quota["pot"],
                floor_p=quota["floor_p"],
                ceiling_p=quota["ceiling_p"],
                share_min=None if quota["share_min"] is None else Fraction(quota["share_min"]),
                share_max=None if quota["share_max"] is None else Fraction(quota["share_max"]),
            )
            for quota in given["quotas"]
        ),
    )


def application_of(given: dict[str, Any]) -> Application:
    return Application(
        id=given["id"],
        firm=given["firm"],
        request_p=given["request_p"],
        mean=Fraction(given["mean"]),
        submitted_at=datetime.fromisoformat(given["submitted_at"]),
        pots=frozenset(given["pots"]),
        enterprise=given["enterprise"],
        headroom_p=given["headroom_p"],
    )


def main(arguments: list[str]) -> int:
    given = json.load(sys.stdin)
    try:
        certificate = allocate(
            call_of(given["call"]),
            [application_of(application) for application in given["applications"]],
            parameter_version=arguments[0],
        )
    except (AllocationInfeasible, AllocationUnproven, InvalidFact) as error:
        json.dump({"reason": error.REASON, "text": str(error)}, sys.stdout)
        return REFUSED
    json.dump(certificate, sys.stdout, sort_keys=True, separators=(",", ":"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
