"""Whether a firm may apply at all, and which SIC divisions are manufacturing (ELIG-1)."""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from services.funding.parameters import ParametersAt
from services.funding.rules.exact import InvalidFact

_SIC = re.compile(r"[A-U]?\s*(?:(?P<pointed>\d{1,2})\.\d{1,2}(?:[./]\d{1,2})?|(?P<division>\d{2})\d{0,3})")


@dataclass(frozen=True, kw_only=True)
class FirmFacts:
    """What is known of an applicant before any figure is looked at."""

    sic: str
    uk_registered: bool
    insolvent: bool
    ailing: bool
    recovery_order_outstanding: bool
    earlier_projects_finished: bool


@dataclass(frozen=True, kw_only=True)
class Eligibility:
    """All reasons against a firm, most basic first; ``code`` is the first of ``codes``."""

    eligible: bool
    code: str | None
    codes: tuple[str, ...]
    reasons: tuple[str, ...]


def sic_division(sic: str) -> int:
    """Division of a SIC 2007 code as written by Companies House or a person: ``33.12``, ``33120``, ``C 33``.

    Raises:
        InvalidFact: not a SIC code.
    """
    found = _SIC.fullmatch(sic.strip()) if isinstance(sic, str) else None
    if found is None:
        raise InvalidFact(f"not a SIC 2007 code: {sic!r}")
    return int(found["pointed"] or found["division"])


def is_manufacturer(sic: str, parameters: ParametersAt) -> bool:
    """Divisions 10 to 33, both included."""
    first = parameters.whole("eligibility.manufacturing_division_first")
    return first <= sic_division(sic) <= parameters.whole("eligibility.manufacturing_division_last")


def eligibility(
    firm: FirmFacts, parameters: ParametersAt, also_divisions: AbstractSet[int] = frozenset()
) -> Eligibility:
    """The pre-check; ``also_divisions`` are SIC divisions that the call admits beside manufacturing."""
    in_sector = is_manufacturer(firm.sic, parameters) or sic_division(firm.sic) in also_divisions
    against = [
        (not in_sector, "NOT_MANUFACTURING", f"SIC {firm.sic} is not manufacturing and the call does not admit it."),
        (not firm.uk_registered, "NOT_UK_REGISTERED", "The firm is not registered in the United Kingdom."),
        (firm.insolvent, "INSOLVENT", "The firm is insolvent."),
        (firm.ailing, "AILING", "The firm is ailing: rescue and restructuring aid is restricted."),
        (firm.recovery_order_outstanding, "RECOVERY_ORDER", "An order to repay a subsidy is outstanding."),
        (not firm.earlier_projects_finished, "EARLIER_PROJECT_OPEN", "An earlier project is not finished."),
    ]
    codes = tuple(code for holds, code, _ in against if holds)
    return Eligibility(
        eligible=not codes,
        code=codes[0] if codes else None,
        codes=codes,
        reasons=tuple(reason for holds, _, reason in against if holds) or ("Nothing speaks against the firm.",),
    )
