"""What may be asked of the fund, by whom; the edges translate and nothing more."""

from collections.abc import Callable

from services.common.clock import Clock
from services.common.database import Pool
from services.common.directory import Directory
from services.common.evidence import Verifier
from services.funding.agreement_changes import AgreementChanges
from services.funding.agreements import AgreementService
from services.funding.allocations import AllocationService
from services.funding.applications import ApplicationService
from services.funding.assessor_finder import AssessorFinder
from services.funding.audits import AuditService
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.change_requests import ChangeService
from services.funding.claims import ClaimService
from services.funding.decisions import DecisionService
from services.funding.groups import GroupService
from services.funding.impacts import ImpactService
from services.funding.journal import Journal
from services.funding.judging import Judge
from services.funding.milestones import MilestoneService
from services.funding.notices import NoticeService
from services.funding.open_data import OpenDataService
from services.funding.parameters import ParameterTable
from services.funding.pools import PoolService
from services.funding.reviews import ReviewService


class UseCases:
    """The use cases, by what they are about."""

    def __init__(
        self,
        pool: Pool,
        *,
        journal: Journal,
        table: ParameterTable,
        directory: Directory,
        verifier: Verifier,
        finder: AssessorFinder,
        clock: Clock,
        kick: Callable[[], None],
    ) -> None:
        judge = Judge(table=table, clock=clock)
        self.calls = CallService(pool, journal=journal, table=table, clock=clock)
        self.applications = ApplicationService(pool, judge=judge, directory=directory, clock=clock)
        self.decisions = DecisionService(pool, judge=judge, table=table, clock=clock, kick=kick)
        self.balances = BalanceService(pool, table=table, clock=clock)
        self.milestones = MilestoneService(pool, verifier=verifier, directory=directory, clock=clock)
        changes = AgreementChanges(pool, table=table, clock=clock, kick=kick)
        self.agreements = AgreementService(pool, changes=changes, table=table, clock=clock)
        self.claims = ClaimService(changes=changes, milestones=self.milestones, table=table, clock=clock)
        self.changes = ChangeService(pool, clock=clock)
        self.impacts = ImpactService(pool, table=table, directory=directory, clock=clock)
        self.reviews = ReviewService(pool, finder=finder, table=table, directory=directory, clock=clock)
        self.allocations = AllocationService(
            pool, judge=judge, reviews=self.reviews, decisions=self.decisions, table=table, clock=clock
        )
        self.pools = PoolService(
            pool, applications=self.applications, reviews=self.reviews, judge=judge, table=table, clock=clock
        )
        self.groups = GroupService(pool, table=table, directory=directory, clock=clock)
        self.audits = AuditService(pool)
        self.notices = NoticeService(pool)
        self.open_data = OpenDataService(pool, directory=directory, clock=clock)
