"""Who may judge an application: experts whose profile fits, without anybody who has a part in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.matching.domain import Assessment, FilterCode, organisation_name
from services.matching.index import ProviderIndex
from services.matching.providers import ProviderRecord
from services.matching.ranking import Excluded, Ranked
from services.matching.service.checks import TITLE_CHARACTERS_MAX, check_text
from services.matching.store import matches as matches_store
from services.matching.store import providers as providers_store

log = get_logger(__name__)

APPLICATION_CHARACTERS_MAX = 20_000
# As many as an enterprise has firms; an application has at most 100 pledges and 20 partners.
PARTIES_MAX = 200
ASSESSORS_MAX = 50
ASSESSORS_DEFAULT = 5

_WHY: Mapping[FilterCode, str] = {
    FilterCode.INACTIVE: "Its partner has withdrawn it.",
    FilterCode.EXPIRED: "Its profile has expired.",
    FilterCode.CONFLICT_OF_INTEREST: "Its partner has declared a conflict with a firm of the application.",
    FilterCode.CONFLICT_ORGANISATION: "It belongs to an organisation of the application or to a partner that works for "
    "one of its firms, or has declared a conflict with one.",
    FilterCode.WORKED_FOR_FIRM: "It works or has worked for a firm of the application through the hub.",
    FilterCode.SECTOR_EXCLUDED: "It does not work for the sector of the application.",
}


@dataclass(frozen=True, kw_only=True)
class Application:
    """What is to be assessed, and who takes part in it."""

    text: str
    sic: str = ""
    region: str = ""
    firm_ids: Sequence[int] = ()
    organisations: Sequence[str] = ()


@dataclass(frozen=True)
class ProposedAssessor:
    provider: ProviderRecord
    ranked: Ranked


@dataclass(frozen=True)
class ExcludedAssessor:
    provider: ProviderRecord
    excluded: Excluded

    @property
    def reasons(self) -> list[str]:
        return [_WHY[code] for code in self.excluded.codes]


@dataclass(frozen=True)
class Proposal:
    # Best first.
    assessors: Sequence[ProposedAssessor]
    excluded: Sequence[ExcludedAssessor]
    excluded_count: int
    degraded: bool
    ranker_version: str


class Assessors:
    """Proposes assessors for applications."""

    def __init__(self, pool: Pool, index: ProviderIndex, directory: Directory) -> None:
        self._pool = pool
        self._index = index
        self._directory = directory

    async def propose_assessors(self, caller: Caller, application: Application, count: int) -> Proposal:
        caller.require(Role.OPERATOR)
        _check(application, count)
        await self._index.check_takes_rankings()
        names = frozenset(map(organisation_name, application.organisations)) - {""}
        owners = {str(each.id) for each in self._directory.partners.values() if organisation_name(each.name) in names}
        async with transaction(self._pool) as connection:
            worked_for, paid = await matches_store.who_works_for(connection, application.firm_ids)
        ranking = await self._index.rank_assessors(
            Assessment(
                text=application.text,
                sic=application.sic,
                region=application.region,
                firm_ids=frozenset(map(str, application.firm_ids)),
                organisations=names,
                owners=frozenset(owners | set(map(str, paid))),
                worked_for=worked_for,
            ),
            count or ASSESSORS_DEFAULT,
        )
        ids = [each.provider_id for each in ranking.ranked] + [each.provider_id for each in ranking.excluded]
        async with transaction(self._pool) as connection:
            known = await providers_store.providers_by_id(connection, ids)
        log.info("assessors proposed", assessors=len(ranking.ranked), excluded=dict(ranking.excluded_counts))
        return Proposal(
            [ProposedAssessor(known[each.provider_id], each) for each in ranking.ranked],
            [ExcludedAssessor(known[each.provider_id], each) for each in ranking.excluded],
            ranking.excluded_total,
            ranking.degraded,
            self._index.version,
        )


def _check(application: Application, count: int) -> None:
    if not application.text.strip():
        raise Invalid("Send the text of the application.", reason="TEXT_MISSING")
    check_text("text", application.text, APPLICATION_CHARACTERS_MAX)
    check_text("sic", application.sic, TITLE_CHARACTERS_MAX)
    check_text("region", application.region, TITLE_CHARACTERS_MAX)
    if max(len(application.firm_ids), len(application.organisations)) > PARTIES_MAX:
        raise Invalid(f"At most {PARTIES_MAX} firms and {PARTIES_MAX} organisations can be named.", reason="TOO_MANY")
    for name in application.organisations:
        check_text("items of conflict_organisations", name, TITLE_CHARACTERS_MAX)
    if not 0 <= count <= ASSESSORS_MAX:
        raise Invalid(f"count is 1 to {ASSESSORS_MAX}; 0 means {ASSESSORS_DEFAULT}.", reason="BAD_COUNT")
