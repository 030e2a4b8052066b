"""The HTTP edge of providers."""

from datetime import date

from fastapi import APIRouter

from services.common.http import Authenticated
from services.matching.domain import Assesses, Kind, Size
from services.matching.forms import Body, PageSize, PageToken, RegistryId, us
from services.matching.providers import Evidence, ProviderRecord
from services.matching.service import Matching


class EvidenceBody(Body):
    title: str
    # Where it is: an address, or the partner's own file number.
    reference: str
    sha256: str
    expires_on: date | None = None
    # The provider is not offered without it.
    required: bool = False


class ProviderBody(Body):
    kind: Kind
    # A partner may leave it out: itself.
    partner_id: RegistryId = 0
    title: str
    text: str
    region: str = ""
    region_bound: bool = False
    regions_served: list[str] = []
    sic_divisions: list[str] = []
    sic_excluded: list[str] = []
    sizes_served: list[Size] = []
    skills: list[str] = []
    # Left out for courses, which have no limit.
    capacity_per_quarter: int | None = None
    lead_days: int = 0
    # Experts only: whether it assesses applications to the fund, "only" if it is never offered to firms.
    assesses: Assesses = Assesses.NO
    # Organisations whose applications it must not judge, by name.
    conflict_organisations: list[str] = []
    # Addresses of ESCO terms.
    esco_skills: list[str] = []
    # Documents that stand behind the profile; kept elsewhere.
    evidence: list[EvidenceBody] = []
    # First day on which the partner must have looked through the profile again: put it anew then.
    review_on: date | None = None
    conflict_firm_ids: list[RegistryId] = []
    # First day on which it is not offered any more.
    expires_on: date | None = None

    def record(self, provider_id: str) -> ProviderRecord:
        capacity = self.capacity_per_quarter or 0
        return ProviderRecord(
            id=provider_id,
            kind=self.kind,
            partner_id=self.partner_id,
            title=self.title,
            text=self.text,
            region=self.region,
            region_bound=self.region_bound,
            regions_served=tuple(self.regions_served),
            sic_divisions=tuple(self.sic_divisions),
            sic_excluded=tuple(self.sic_excluded),
            sizes_served=tuple(self.sizes_served),
            skills=tuple(self.skills),
            capacity_per_quarter=None if self.kind is Kind.COURSE else capacity,
            lead_days=self.lead_days,
            assesses=self.assesses,
            conflict_organisations=tuple(self.conflict_organisations),
            esco_skills=tuple(self.esco_skills),
            evidence=tuple(Evidence(**each.model_dump()) for each in self.evidence),
            review_on=self.review_on,
            conflict_firm_ids=tuple(self.conflict_firm_ids),
            expires_on=self.expires_on,
        )


class ProviderView(ProviderBody):
    id: str
    active: bool
    # First day on which it is not offered: expired, due for review, or without a document that it needs.
    offered_until: date | None
    taken_this_quarter: int
    changed_us: int | None


class ProvidersPage(Body):
    providers: list[ProviderView]
    next_page_token: str


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/providers", tags=["providers"])

    @routes.put("/{provider_id}")
    async def put_provider(caller: Authenticated, provider_id: str, body: ProviderBody) -> ProviderView:
        """Create a provider, or replace the one with this id."""
        return _provider_view(await matching.providers.put_provider(caller, body.record(provider_id)))

    @routes.get("/{provider_id}")
    async def get_provider(caller: Authenticated, provider_id: str) -> ProviderView:
        return _provider_view(await matching.providers.get_provider(caller, provider_id))

    @routes.get("")
    async def list_providers(
        caller: Authenticated,
        partner_id: RegistryId = 0,
        kind: Kind | None = None,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> ProvidersPage:
        """In order of id. Partners and operators see withdrawn and expired ones too."""
        found, token = await matching.providers.list_providers(
            caller, partner_id=partner_id, kind=kind, page_size=page_size, page_token=page_token
        )
        return ProvidersPage(providers=[_provider_view(each) for each in found], next_page_token=token)

    @routes.post("/{provider_id}/withdraw")
    async def withdraw_provider(caller: Authenticated, provider_id: str) -> ProviderView:
        """No new offers; those still open lapse; matches stay."""
        return _provider_view(await matching.providers.withdraw_provider(caller, provider_id))

    return routes


def _provider_view(provider: ProviderRecord) -> ProviderView:
    return ProviderView(
        id=provider.id,
        kind=provider.kind,
        partner_id=provider.partner_id,
        title=provider.title,
        text=provider.text,
        region=provider.region,
        region_bound=provider.region_bound,
        regions_served=list(provider.regions_served),
        sic_divisions=list(provider.sic_divisions),
        sic_excluded=list(provider.sic_excluded),
        sizes_served=list(provider.sizes_served),
        skills=list(provider.skills),
        capacity_per_quarter=provider.capacity_per_quarter,
        lead_days=provider.lead_days,
        assesses=provider.assesses,
        conflict_organisations=list(provider.conflict_organisations),
        esco_skills=list(provider.esco_skills),
        evidence=[
            EvidenceBody(
                title=each.title,
                reference=each.reference,
                sha256=each.sha256,
                expires_on=each.expires_on,
                required=each.required,
            )
            for each in provider.evidence
        ],
        review_on=provider.review_on,
        offered_until=provider.offered_until,
        conflict_firm_ids=list(provider.conflict_firm_ids),
        expires_on=provider.expires_on,
        active=provider.active,
        taken_this_quarter=provider.taken,
        changed_us=us(provider.changed),
    )
