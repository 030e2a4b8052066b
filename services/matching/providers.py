"""A provider as its partner has described it, with what the hub keeps beside it."""

from dataclasses import dataclass, replace
from datetime import date, datetime

from services.matching.domain import Assesses, Kind, Provider, Size, organisation_name

UNLIMITED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A document that stands behind a profile, kept elsewhere: what it is, where, and its digest, so that nobody can swap it."""

    title: str
    # Where it is: an address, or the partner's own file number.
    reference: str
    # In hexadecimal, lower case.
    sha256: str
    # First day on which it does not hold any more.
    expires_on: date | None = None
    # The provider is not offered without it.
    required: bool = False

    def is_valid(self, day: date) -> bool:
        return self.expires_on is None or day < self.expires_on


@dataclass(frozen=True, kw_only=True)
class ProviderRecord:
    """What a partner puts, and what the hub sets: `active`, `change`, `changed`, `taken`."""

    id: str
    kind: Kind
    partner_id: int
    title: str
    text: str
    region: str
    region_bound: bool = False
    regions_served: tuple[str, ...] = ()
    sic_divisions: tuple[str, ...] = ()
    sic_excluded: tuple[str, ...] = ()
    sizes_served: tuple[Size, ...] = ()
    skills: tuple[str, ...] = ()
    # Addresses of terms of ESCO, the European vocabulary of skills.
    esco_skills: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    # First day on which the partner must have looked through the profile again.
    review_on: date | None = None
    # None: no limit, for courses.
    capacity_per_quarter: int | None
    lead_days: int = 0
    assesses: Assesses = Assesses.NO
    conflict_organisations: tuple[str, ...] = ()
    conflict_firm_ids: tuple[int, ...] = ()
    expires_on: date | None = None
    active: bool = True
    change: int = 0
    changed: datetime | None = None
    # What firms have scored: how many firms, and the sum of their newest scores.
    outcome_firms: int = 0
    outcome_points: int = 0
    # Places taken in the quarter that was asked about.
    taken: int = 0

    @property
    def offered_until(self) -> date | None:
        """First day on which it is not offered: expired, due for review, or without a document that it needs."""
        return min((day for day, _ in self.ends), default=None)

    @property
    def ends(self) -> list[tuple[date, str]]:
        """What takes it out of the offers, and on which day."""
        papers = [(each.expires_on, f'its document "{each.title}" runs out') for each in self.evidence if each.required]
        ends = [(self.expires_on, "it expires"), (self.review_on, "its review is due"), *papers]
        return [(day, what) for day, what in ends if day is not None]

    def is_live(self, day: date) -> bool:
        """May be offered and accepted on that day."""
        return self.active and (self.offered_until is None or day < self.offered_until)

    def for_ranking(self) -> Provider:
        """What the ranker looks at, with the places that were free in the quarter of `taken`."""
        capacity = UNLIMITED if self.capacity_per_quarter is None else self.capacity_per_quarter
        return Provider(
            id=self.id,
            kind=self.kind,
            title=self.title,
            text=self.text,
            owner=str(self.partner_id),
            region=self.region,
            region_bound=self.region_bound,
            regions_served=frozenset(self.regions_served),
            sic_divisions=frozenset(self.sic_divisions or ("any",)),
            sic_excluded=frozenset(self.sic_excluded),
            sizes_served=frozenset(self.sizes_served),
            skills=frozenset((*self.skills, *self.esco_skills)),
            capacity_per_quarter=capacity,
            # A course has room for everybody: a number would be another value of the index with each that is taken.
            capacity_left=None if self.capacity_per_quarter is None else max(0, capacity - self.taken),
            lead_days=self.lead_days,
            active=self.active,
            expires_on=self.offered_until,
            assesses=self.assesses,
            conflict_organisations=frozenset(map(organisation_name, self.conflict_organisations)),
            outcome_firms=self.outcome_firms,
            outcome_points=self.outcome_points,
            conflicts=frozenset(str(firm_id) for firm_id in self.conflict_firm_ids),
        )

    def without_conflicts(self) -> "ProviderRecord":
        """As others than its partner may see it."""
        return replace(self, conflict_firm_ids=(), conflict_organisations=())
