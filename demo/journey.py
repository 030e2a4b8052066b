"""The journey of the demo: telemetry, alarm, need, offer, match, application, award, on the running hub."""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import asyncpg
import httpx
import orjson

from demo.story import Source, Step, Story
from localstack.hub import Hub
from smdih_client import TelemetryClient
from smdih_client.tls import Tls

ROWS_A_BATCH = 25
STREAM_S = 8.0  # the plant's hours pass in about so many seconds
CALL_DEADLINE_S = 90
ALARM_QUIET_S = 1.5
OWN_WORDS = (
    "We want someone to look at the data of our machine with us, find what is unusual in it "
    "and set up monitoring that warns us before it stops."
)
# A small firm under either definition.
DECLARATION = {
    "size": {
        "headcount": "31",
        "turnover_minor": 420_000_000,
        "balance_minor": 190_000_000,
        "period_start": "2025-07-01",
    },
    "uk_registered": True,
}
COSTS = (
    ("labour", 24_000_00),
    ("overhead", 4_800_00),
    ("subcontracting", 15_000_00),
    ("materials", 4_200_00),
)


class JourneyError(Exception):
    """The journey cannot go on; the message says where it stopped."""


class Journey:
    """Walks a story through the hub. Every call is repeated until it is answered: processes may die on the way."""

    def __init__(self, hub: Hub, story: Story) -> None:
        self._hub = hub
        self._story = story
        self._run = secrets.token_hex(3)
        self._keys: dict[str, str] = {"operator": hub.operator_key}
        self._firm: dict[str, Any] = {}

    async def walk(self) -> None:
        """Go the whole way. Raises JourneyError."""
        story = self._story
        async with self._step("Register firm, machines and partner") as step:
            await self._register()
            step.outcome = (
                f"{len(story.sources)} machines, {sum(len(source.signals) for source in story.sources)} signals"
            )
        async with self._step("Partner offers its experts, facilities, workshops and courses") as step:
            step.outcome = f"{await self._offer_providers()} providers"
        async with self._step("Firm agrees that alarms may open needs; the fund opens a call") as step:
            call = await self._consent_and_call()
            step.outcome = f"call with {_pounds(call['budget_pence'])}"
        async with self._step("Stream telemetry through the gRPC door") as step:
            await self._stream()
            step.outcome = f"{story.counts.acknowledged:,} samples acknowledged"
        async with self._step("Store every acknowledged sample") as step:
            await self._wait_stored()
            step.outcome = (
                f"{story.counts.stored:,} stored, {story.counts.lost} lost, {story.counts.duplicated} duplicated"
            )
        async with self._step("Notice and explain what is abnormal") as step:
            await self._wait_alarms()
            step.outcome = f"{len(story.alarms)} alarms"
        async with self._step("Open a need and rank who can help") as step:
            await self._need()
            assert story.need is not None
            step.outcome = f"{len(story.offers)} offers, best: {story.offers[0]['provider_title']}"
        async with self._step("Accept the best offer: a match") as step:
            await self._accept()
            assert story.match is not None
            step.outcome = f"match {story.match['id'][:8]}"
        async with self._step("Check, co-invest and award from the fund") as step:
            award = await self._fund(call)
            step.outcome = (
                f"{_pounds(award['grant_pence'])} grant, {_pounds(award['co_investment_pence'])} co-investment"
            )

    # The steps ----------------------------------------------------------------------------------------------------------

    async def _register(self) -> None:
        body = {"name": f"Demo Manufacturing {self._run} Ltd", "slug": f"demo-{self._run}", "sic": "25.62"}
        self._firm = await self._call(
            "ingest", "POST", "/v1/firms", body | {"region": "Northern Ireland", "size": "small"}
        )
        firm_id = self._firm["id"]
        site = await self._call("ingest", "POST", "/v1/sites", {"firm_id": firm_id, "slug": "works", "name": "Works"})
        partner_body = {"name": f"Demo Regional Centre {self._run}", "region": "Northern Ireland"}
        partner = await self._call("ingest", "POST", "/v1/partners", partner_body)
        for role, owner in (
            ("device", {"firm_id": firm_id}),
            ("firm", {"firm_id": firm_id}),
            ("partner", {"partner_id": partner["id"]}),
        ):
            made = await self._call("ingest", "POST", "/v1/credentials", {"role": role, "label": "demo", **owner})
            self._keys[role] = made["key"]
        for source in self._story.sources:
            machine = await self._call(
                "ingest",
                "POST",
                "/v1/machines",
                {
                    "site_id": site["id"],
                    "path": source.path,
                    "name": source.name,
                    "kind": source.kind,
                    "signals": [{"name": signal.name, "unit": signal.unit} for signal in source.signals],
                },
            )
            source.machine_id = machine["id"]
            source.signal_ids = tuple(signal["id"] for signal in machine["signals"])

    async def _offer_providers(self) -> int:
        providers = orjson.loads((resources.files("demo") / "providers.json").read_bytes())
        for provider in providers:
            provider_id = f"{provider.pop('id')}-{self._run}"
            await self._call("matching", "PUT", f"/v1/providers/{provider_id}", provider, key="partner")
        return len(providers)

    async def _consent_and_call(self) -> dict[str, Any]:
        consent = {
            "request_id": f"consent-{self._run}",
            "shared": ["fault", "figures", "profile"],
            "note": "Given for the demo by the plant manager",
        }
        await self._call("matching", "POST", "/v1/consents", consent, key="firm")
        now_us = time.time_ns() // 1000
        call = {
            "request_id": f"call-{self._run}",
            "title": "Data for better machines",
            "budget_pence": 2_000_000_00,
            "opens_us": now_us - 60_000_000,
            "closes_us": now_us + 90 * 86_400_000_000,
            "category": "experimental_development",
            "size_definition": "COMPANIES_ACT_2006",
            "rate_max": "0.40",
        }
        return await self._call("funding", "POST", "/v1/calls", call)

    async def _stream(self) -> None:
        story = self._story
        async with TelemetryClient(
            self._hub.processes["door"].grpc,
            self._keys["device"],
            source=f"demo-gateway-{self._run}",
            credentials=Tls(self._hub.ca) if self._hub.ca else None,
        ) as client:
            began = time.monotonic()
            sent = 0
            for round_, batches in enumerate(_rounds(story.sources)):
                for source, rows in batches:
                    await client.send(source.machine_id, source.times_us[rows], source.values[rows])
                sent = client.totals.sent
                story.counts.sent = sent + story.counts.refused
                story.counts.acknowledged = client.totals.acknowledged
                # Paced, so that there is something to see.
                ahead_s = STREAM_S * sent / max(1, story.total_samples) - (time.monotonic() - began)
                if ahead_s > 0.01 or round_ % 10 == 0:
                    await asyncio.sleep(max(0.0, ahead_s))
            await client.flush()
            story.counts.acknowledged = client.totals.acknowledged
            story.counts.quarantined = client.totals.quarantined

    async def _wait_stored(self) -> None:
        until = time.monotonic() + CALL_DEADLINE_S
        while self._story.counts.lost > 0:
            if time.monotonic() > until:
                raise JourneyError(
                    f"{self._story.counts.lost} acknowledged samples are not stored after {CALL_DEADLINE_S} s"
                )
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.2)

    async def _wait_alarms(self) -> None:
        """Until the detector has seen everything and no new alarm has come for a moment."""
        until = time.monotonic() + CALL_DEADLINE_S
        quiet_since, known = time.monotonic(), -1
        while time.monotonic() - quiet_since < ALARM_QUIET_S:
            if time.monotonic() > until:
                raise JourneyError(f"the detector has not caught up after {CALL_DEADLINE_S} s")
            await self._read_alarms()
            if len(self._story.alarms) != known or self._story.lag > 0:
                quiet_since, known = time.monotonic(), len(self._story.alarms)
            await asyncio.sleep(0.2)
        if self._story.alarms:
            first = self._story.alarms[0]
            await self._call(
                "anomaly",
                "POST",
                f"/v1/alarms/{first['id']}/acknowledge",
                {"comment": "seen on the demo screen"},
                key="firm",
            )

    async def _read_alarms(self) -> None:
        alarms: list[dict[str, Any]] = []
        token = ""
        while True:
            page = await self._call("anomaly", "GET", f"/v1/alarms?page_size=100&page_token={token}", key="firm")
            alarms += page["alarms"]
            token = page["next_page_token"]
            if not token:
                break
        self._story.alarms = sorted(alarms, key=lambda alarm: alarm["started_us"])

    async def _need(self) -> None:
        """The need of the clearest alarm, opened by the hub itself; without any alarm the firm asks in its own words."""
        story = self._story
        if story.alarms:
            needs = await self._until(self._needs_of_alarms, "an alarm to open a need")
            story.need = max(needs, key=self._clearness)
        else:
            body = {"request_id": f"need-{self._run}", "text": OWN_WORDS, "machine_id": story.sources[0].machine_id}
            story.need = (await self._call("matching", "POST", "/v1/needs", body, key="firm"))["need"]
        found = await self._call("matching", "GET", f"/v1/needs/{story.need['id']}/offers", key="firm")
        story.offers = sorted(found["offers"], key=lambda offer: offer["rank"])
        if not story.offers:
            raise JourneyError(f"no provider was offered: {story.need['no_offer_reason']}")

    async def _needs_of_alarms(self) -> list[dict[str, Any]]:
        """The needs, once every machine with an alarm has one."""
        found = await self._call("matching", "GET", "/v1/needs?page_size=100", key="firm")
        machines = {need["machine_id"] for need in found["needs"]}
        alarmed = {alarm["machine_id"] for alarm in self._story.alarms}
        return list(found["needs"]) if alarmed <= machines else []

    def _clearness(self, need: dict[str, Any]) -> tuple[bool, float]:
        """How clear the case is: an alarm of a known fault first, then the highest score."""
        alarms = [alarm for alarm in self._story.alarms if alarm["id"] in need["alarm_ids"]]
        known = any(self._story.fault_of(alarm) is not None for alarm in alarms)
        return known, max((alarm["score"] for alarm in alarms), default=0.0)

    async def _accept(self) -> None:
        offer = self._story.offers[0]
        self._story.match = (await self._call("matching", "POST", f"/v1/offers/{offer['id']}/accept", {}, key="firm"))[
            "match"
        ]

    async def _fund(self, call: dict[str, Any]) -> dict[str, Any]:
        story = self._story
        assert story.match is not None
        cost = sum(pence for _, pence in COSTS)
        check = {"call_id": call["id"], "declaration": DECLARATION, "planned_cost_pence": cost}
        await self._call("funding", "POST", "/v1/pre-check", check, key="firm")
        application = await self._call(
            "funding",
            "POST",
            "/v1/applications",
            {
                "request_id": f"application-{self._run}",
                "call_id": call["id"],
                "match_id": story.match["id"],
                "costs": [{"category": category, "amount_pence": pence} for category, pence in COSTS],
                "declaration": DECLARATION,
            },
            key="firm",
            also_retry={"MATCH_UNKNOWN"},
        )
        grant = application["assessment"]["max_grant_pence"]
        path = f"/v1/applications/{application['id']}"
        own = (cost - grant) * 2 // 3
        for number, (co_investor, pence) in enumerate((("The firm itself", own), ("Its customer", cost - grant - own))):
            body = {
                "request_id": f"pledge-{number}-{self._run}",
                "co_investor": co_investor,
                "kind": "cash",
                "amount_pence": pence,
            }
            pledge = await self._call("funding", "POST", f"{path}/pledges", body, key="firm")
            evidence = {"evidence": "bank letter seen"}
            await self._call("funding", "POST", f"{path}/pledges/{pledge['id']}/confirm", evidence)
        await self._call("funding", "POST", f"{path}/submit", {}, key="firm")
        reason = "Every rule is met and the match is confirmed"
        story.application = await self._call("funding", "POST", f"{path}/decide", {"award": True, "reason": reason})
        story.trial_balance = await self._call("funding", "GET", "/v1/ledger/trial-balance")
        award: dict[str, Any] = story.application["award"]
        return award

    # Calls --------------------------------------------------------------------------------------------------------------

    async def _call(
        self,
        service: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str = "operator",
        also_retry: frozenset[str] | set[str] = frozenset(),
    ) -> dict[str, Any]:
        """One request, sent again while the service is away; every request of the journey may be repeated safely."""
        base = self._hub.endpoints()[service]["http"]
        until = time.monotonic() + CALL_DEADLINE_S
        headers = {"Authorization": f"Bearer {self._keys[key]}", "X-Correlation-Id": f"demo-{self._run}"}
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=20, verify=self._hub.verify) as client:
            while True:
                try:
                    answer = await client.request(method, path, json=body)
                except httpx.HTTPError as error:
                    problem = repr(error)
                else:
                    if answer.is_success:
                        found: dict[str, Any] = answer.json()
                        return found
                    problem = answer.text
                    reason = answer.json().get("reason", "") if "json" in answer.headers.get("content-type", "") else ""
                    # Right after a start a service may not know a new key yet.
                    if answer.status_code not in (401, 429, 502, 503) and reason not in also_retry:
                        raise JourneyError(f"{method} {service}{path}: {answer.status_code} {problem}")
                if time.monotonic() > until:
                    raise JourneyError(f"{method} {service}{path}: no good answer in {CALL_DEADLINE_S} s: {problem}")
                await asyncio.sleep(0.2)

    async def _until(self, ask: Callable[[], Awaitable[list[dict[str, Any]]]], what: str) -> list[dict[str, Any]]:
        until = time.monotonic() + CALL_DEADLINE_S
        while not (found := await ask()):
            if time.monotonic() > until:
                raise JourneyError(f"waited {CALL_DEADLINE_S} s for {what}")
            await asyncio.sleep(0.2)
        return found

    @asynccontextmanager
    async def _step(self, title: str) -> AsyncIterator[Step]:
        step = Step(title, self._story.elapsed_s)
        self._story.steps.append(step)
        yield step
        step.ended_s = self._story.elapsed_s


class Observer:
    """Keeps a story's figures current: what is stored, how far the hub is behind, how often processes were started."""

    def __init__(self, hub: Hub, story: Story) -> None:
        self._hub = hub
        self._story = story

    async def run(self) -> None:
        """Look every half second until cancelled."""
        pool = await asyncpg.create_pool(self._hub.settings.database_dsn, min_size=1, max_size=1)
        last_stored, last_at = 0, time.monotonic()
        async with pool, httpx.AsyncClient(timeout=2, verify=self._hub.verify) as client:
            while True:
                # A database or a process that is away for a moment is part of what the demo may show.
                with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await self._count(pool)
                story, now = self._story, time.monotonic()
                story.rate = (story.counts.stored - last_stored) / max(now - last_at, 1e-3)
                last_stored, last_at = story.counts.stored, now
                story.lag = sum([await self._lag(client, name) for name in ("historian", "anomaly-worker")])
                story.restarts = sum(max(0, running.starts - 1) for running in self._hub.processes.values())
                await asyncio.sleep(0.5)

    async def _count(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        machines = [source.machine_id for source in self._story.sources if source.machine_id]
        row = await pool.fetchrow(
            "SELECT coalesce(sum(cardinality(values) - cardinality(array_positions(values, NULL))), 0) AS stored, "
            "count(*) - count(DISTINCT (machine_id, first_position, ts)) AS duplicated "
            "FROM ingest.frame WHERE machine_id = ANY($1::bigint[])",
            machines,
        )
        assert row is not None
        self._story.counts.stored, self._story.counts.duplicated = int(row["stored"]), int(row["duplicated"])
        if row["stored"] and self._story.first_sample_s is None:
            self._story.first_sample_s = self._story.elapsed_s

    async def _lag(self, client: httpx.AsyncClient, name: str) -> int:
        """Records that a process has still to take in; 1 when it does not answer or does not know yet."""
        base = self._hub.processes[name].probes
        try:
            if (await client.get(f"{base}/readyz")).status_code != 200:
                return 1
            text = (await client.get(f"{base}/metrics")).text
        except httpx.HTTPError:
            return 1
        return int(
            sum(
                float(value) for value in re.findall(r"^smdih_kafka_lag_records\{[^}]*samples[^}]*\} (\S+)", text, re.M)
            )
        )


def _rounds(sources: list[Source]) -> list[list[tuple[Source, slice]]]:
    """The batches in the order of sending: each round one batch of every machine, as a gateway would."""
    longest = max(len(source.times_us) for source in sources)
    return [
        [(source, slice(row, row + ROWS_A_BATCH)) for source in sources if row < len(source.times_us)]
        for row in range(0, longest, ROWS_A_BATCH)
    ]


def _pounds(pence: int) -> str:
    return f"£{pence // 100:,}.{pence % 100:02d}"
