"""What may be asked of the matching service, by whom; the edges translate and nothing more."""

from services.common.clock import Clock
from services.common.database import Pool
from services.common.directory import Directory
from services.common.outbox import OutboxRelay
from services.matching.index import ProviderIndex
from services.matching.needs import Limits
from services.matching.service.assessors import Assessors
from services.matching.service.checks import Known
from services.matching.service.consents import Consents
from services.matching.service.desk import Desk
from services.matching.service.matches import Matches
from services.matching.service.maturity import Maturity
from services.matching.service.need_life import NeedLife
from services.matching.service.needs import Needs
from services.matching.service.notices import Notices
from services.matching.service.offers import Offers
from services.matching.service.providers import Providers
from services.matching.service.reports import Reports
from services.matching.service.rooms import Rooms
from services.matching.service.rounds import Rounds
from services.matching.service.sessions import Sessions


class Matching:
    """The use cases, by what they are about."""

    def __init__(
        self,
        pool: Pool,
        index: ProviderIndex,
        relay: OutboxRelay,
        directory: Directory,
        *,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self.providers = Providers(pool, index, directory, clock=clock)
        life = NeedLife(clock=clock, limits=limits)
        self.consents = Consents(pool, relay, Known(directory), life, clock=clock)
        self.offers = Offers(pool, index, relay, life, clock=clock, limits=limits)
        self.desk = Desk(pool, index, relay, directory, self.offers, clock=clock, limits=limits)
        self.rounds = Rounds(pool, index, relay, self.offers, clock=clock, limits=limits)
        self.matches = Matches(pool, index, relay, life, clock=clock, limits=limits)
        self.assessors = Assessors(pool, index, directory)
        self.rooms = Rooms(pool, relay, directory, Known(directory), clock=clock)
        self.sessions = Sessions(pool, relay, Known(directory), clock=clock)
        self.needs = Needs(pool, index, relay, directory, self.offers, life, clock=clock, limits=limits)
        self.maturity = Maturity(pool, Known(directory), self.needs, clock=clock)
        self.notices = Notices(pool, clock=clock)
        self.reports = Reports(pool, clock=clock)
