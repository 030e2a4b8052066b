"""People at work on a hub that fails: firms that send, ask, apply and claim, and what they were told of it.

Each call is repeated until it is answered; every one of them may be repeated. What was told once must hold at the end.
"""

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import numpy as np

from demo.journey import COSTS, DECLARATION
from services.common.clock import SystemClock, today
from smdih_client import TelemetryClient
from tests import anomaly_plant as plant

# On a busy machine a service that was killed needs minutes until it answers again.
CALL_DEADLINE_S = 480.0
CALL_TIMEOUT_S = 20.0
MACHINES = 3
ROWS_A_BATCH = 20
FAULT_EVERY, FAULT_ROWS = 300, 20
BATCH_EVERY_S = 1.0
THINKING_S = (0.05, 1.0)
DECLINED_SHARE = 0.25
SEATS = 5
# A process that has just started may not know a key yet; the others say themselves that it goes on later.
LATER = (401, 429, 502, 503)
SIGNALS = [{"name": name, "unit": unit} for name, unit in plant.SIGNALS]

# Where a service answers now, as "http://host:port".
Address = Callable[[str], str]


class Unanswered(Exception):
    """No good answer in CALL_DEADLINE_S, or one that nobody should get."""


@dataclass
class Told:
    """What people were told, to be compared with what the hub holds."""

    # Match -> offer.
    matches: dict[str, str] = field(default_factory=dict)
    declined: set[str] = field(default_factory=set)
    bookings: dict[str, str] = field(default_factory=dict)
    # Award -> pence.
    awards: dict[str, int] = field(default_factory=dict)
    # Claim -> pence.
    paid: dict[str, int] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)
    # Machine -> frames.
    frames: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    repeats: int = 0
    # Answers that said "not yet", as what one service tells another takes a moment.
    waits: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    # What was answered to the calls that were repeated.
    failures: Counter[str] = field(default_factory=Counter)


class Caller:
    """Calls a hub's HTTP services with the keys of a firm, its partner and the operators."""

    def __init__(self, address: Address, keys: Mapping[str, str], told: Told) -> None:
        self._address = address
        self.keys = dict(keys)
        self._told = told

    async def call(
        self,
        service: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str = "operator",
        later: Collection[str] = (),
        refusals: Collection[str] = (),
    ) -> dict[str, Any]:
        """The answer. `later`: reasons that pass; `refusals`: reasons that are an answer too, returned as {"refused": reason}."""
        until = time.monotonic() + CALL_DEADLINE_S
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        self._told.calls += 1
        while True:
            reason = ""
            try:
                async with httpx.AsyncClient(timeout=CALL_TIMEOUT_S) as client:
                    answer = await client.request(method, self._address(service) + path, json=body, headers=headers)
            except httpx.HTTPError as error:
                problem = repr(error)
            else:
                found: dict[str, Any] = answer.json() if "json" in answer.headers.get("content-type", "") else {}
                if answer.is_success:
                    return found
                problem, reason = f"{answer.status_code} {answer.text[:300]}", str(found.get("reason", ""))
                if reason in refusals:
                    self._told.refused[reason] += 1
                    return {"refused": reason}
                if answer.status_code not in LATER and reason not in later:
                    raise Unanswered(f"{method} {service}{path}: {problem}")
            if time.monotonic() > until:
                raise Unanswered(f"{method} {service}{path}: no good answer in {CALL_DEADLINE_S:.0f} s: {problem}")
            if reason in later:
                self._told.waits += 1
            else:
                self._told.repeats += 1
                self._told.failures[problem[:200]] += 1
            await asyncio.sleep(0.2)


@dataclass
class World:
    """What all firms share: a call of the fund, providers, a session with seats, two operators."""

    address: Address
    told: Told
    caller: Caller
    call_id: str = ""
    session_id: str = ""

    @classmethod
    async def make(cls, address: Address, operator_key: str) -> "World":
        told = Told()
        world = cls(address, told, Caller(address, {"operator": operator_key}, told))
        call, name = world.caller.call, secrets.token_hex(4)
        world.caller.keys["second"] = (await call("ingest", "POST", "/v1/credentials", {"role": "operator"}))["key"]
        partner = await call("ingest", "POST", "/v1/partners", {"name": f"Centre {name}", "region": "Wales"})
        made = await call("ingest", "POST", "/v1/credentials", {"role": "partner", "partner_id": partner["id"]})
        world.caller.keys["partner"] = made["key"]
        for number, kind in enumerate(("expert", "expert", "facility", "workshop")):
            provider = {
                "kind": kind,
                "title": f"Machine data {number}",
                "region": "Wales",
                "capacity_per_quarter": 30,
                "sic_divisions": [],
                "text": "Finds what is wrong with presses from temperature, vibration and current; sets up monitoring.",
            }
            await call("matching", "PUT", f"/v1/providers/chaos-{number}-{name}", provider, key="partner")
        starts_us = SystemClock().now_us() // 60_000_000 * 60_000_000 + 20 * 86_400_000_000
        world.session_id = f"day-{name}"
        session = {
            "provider_id": f"chaos-3-{name}",
            "title": "A day",
            "starts_us": starts_us,
            "ends_us": starts_us + 3_600_000_000,
            "seats": SEATS,
        }
        await call("matching", "PUT", f"/v1/sessions/{world.session_id}", session, key="partner")
        now_us = SystemClock().now_us()
        fund = {
            "request_id": f"call-{name}",
            "title": "Data for better machines",
            "budget_pence": 15_000_000_00,
            "opens_us": now_us - 60_000_000,
            "closes_us": now_us + 90 * 86_400_000_000,
            "category": "experimental_development",
            "size_definition": "COMPANIES_ACT_2006",
            "rate_max": "0.40",
        }
        world.call_id = (await call("funding", "POST", "/v1/calls", fund))["id"]
        return world


class Firm:
    """A firm with machines that now and then show a fault, and somebody who looks for help and for money."""

    def __init__(self, world: World, number: int, rng: random.Random) -> None:
        self._world, self._told, self._rng = world, world.told, rng
        self._caller = Caller(world.address, world.caller.keys, world.told)
        self.call = self._caller.call
        self.slug = f"firm-{number}-{secrets.token_hex(2)}"
        self.id = 0
        self.machines: list[int] = []
        self._requests = 0

    async def open(self) -> None:
        """Registered, with machines, keys, and the consent that alarms open needs."""
        body = {"name": self.slug, "slug": self.slug, "sic": "25.62", "region": "Wales", "size": "small"}
        self.id = (await self.call("ingest", "POST", "/v1/firms", body))["id"]
        site = {"firm_id": self.id, "slug": "works", "name": "Works"}
        site_id = (await self.call("ingest", "POST", "/v1/sites", site))["id"]
        for role in ("firm", "device"):
            made = await self.call("ingest", "POST", "/v1/credentials", {"role": role, "firm_id": self.id})
            self._caller.keys[role] = made["key"]
        for number in range(MACHINES):
            machine = {
                "site_id": site_id,
                "path": f"press-{number}",
                "name": "Press",
                "kind": "press",
                "signals": SIGNALS,
            }
            self.machines.append((await self.call("ingest", "POST", "/v1/machines", machine))["id"])
        consent = {"request_id": "consent", "shared": ["fault", "figures", "profile"], "note": "for the trial"}
        await self.call("matching", "POST", "/v1/consents", consent, key="firm")

    async def send(self, target: str, stop: asyncio.Event) -> None:
        """Telemetry of all machines until told to stop; then until all of it is acknowledged."""
        seeds = {machine: self._rng.randrange(2**31) for machine in self.machines}
        start_us = SystemClock().now_us() // 1_000_000 * 1_000_000 - 5 * 86_400 * 1_000_000
        row = 0
        async with TelemetryClient(target, self._caller.keys["device"], source=f"gateway-{self.slug}") as client:
            while not stop.is_set():
                for number, machine in enumerate(self.machines):
                    values = plant.calm(seeds[machine] + row, ROWS_A_BATCH)
                    phase = (row + number * 70) % FAULT_EVERY
                    if row >= FAULT_EVERY and phase < FAULT_ROWS:
                        values[:, number % 3] += 20.0 * (1 + self._rng.random())
                    times = start_us + (row + np.arange(ROWS_A_BATCH)) * 1_000_000
                    await client.send(machine, times, values)
                    self._told.frames[machine] += ROWS_A_BATCH
                row += ROWS_A_BATCH
                await asyncio.sleep(BATCH_EVERY_S)
            await client.flush()
            if client.totals.quarantined or client.totals.acknowledged != client.totals.sent:
                raise Unanswered(f"{self.slug}: {client.totals}")

    async def live(self, stop: asyncio.Event) -> None:
        """Journey after journey until told to stop; what was begun is ended."""
        while not stop.is_set():
            await self._think()
            match_id = await self._find_help()
            await self._book()
            if match_id and not stop.is_set():
                await self._be_funded(match_id)

    async def _think(self) -> None:
        await asyncio.sleep(self._rng.uniform(*THINKING_S))

    def _request(self) -> str:
        self._requests += 1
        return f"{self.slug}-{self._requests}"

    async def _find_help(self) -> str:
        """A match, out of an alarm's need if there is one, else of one in own words; empty: nobody took it."""
        found = await self.call("matching", "GET", "/v1/needs?page_size=100", key="firm")
        waiting = [need for need in found["needs"] if need["state"] == "open" and need["source"] == "anomaly"]
        if waiting:
            need = self._rng.choice(waiting)
        else:
            body = {"request_id": self._request(), "text": "Who looks at the vibration of a press with us?"}
            opened = await self.call("matching", "POST", "/v1/needs", body, key="firm", refusals=("TOO_MANY_NEEDS",))
            if "refused" in opened:
                await self._give_up(found["needs"])
                return ""
            need = opened["need"]
        self._told.needs.add(need["id"])
        found = await self.call("matching", "GET", f"/v1/needs/{need['id']}/offers", key="firm")
        for offer in sorted(found["offers"], key=lambda each: int(each["rank"])):
            if offer["state"] != "made":
                continue
            path = f"/v1/offers/{offer['id']}"
            if self._rng.random() < DECLINED_SHARE:
                await self.call("matching", "POST", f"{path}/decline", {"reason": "too_far"}, key="firm")
                self._told.declined.add(offer["id"])
                continue
            answer = await self.call("matching", "POST", f"{path}/accept", {}, key="firm", refusals=("CAPACITY_FULL",))
            if "refused" not in answer:
                self._told.matches[answer["match"]["id"]] = offer["id"]
                return str(answer["match"]["id"])
        return ""

    async def _give_up(self, needs: list[dict[str, Any]]) -> None:
        """Close those in own words that nobody was found for, so that there is room for another."""
        for need in needs:
            if need["state"] == "open" and need["source"] != "anomaly" and not need["offers"]:
                path = f"/v1/needs/{need['id']}/close"
                await self.call("matching", "POST", path, {"reason": "solved without help"}, key="firm")

    async def _book(self) -> None:
        body = {"request_id": self._request(), "session_id": self._world.session_id}
        refusals = ("TOO_MANY_BOOKINGS", "WAITING_LIST_FULL")
        booking = await self.call("matching", "POST", "/v1/bookings", body, key="firm", refusals=refusals)
        if "refused" in booking:
            return
        self._told.bookings[booking["id"]] = booking["state"]
        if self._rng.random() < 0.5:
            await self.call("matching", "POST", f"/v1/bookings/{booking['id']}/cancel", key="firm")
            self._told.bookings[booking["id"]] = "cancelled"

    async def _be_funded(self, match_id: str) -> None:
        """From the application to the first payment."""
        cost = sum(pence for _, pence in COSTS)
        application = await self.call(
            "funding",
            "POST",
            "/v1/applications",
            {
                "request_id": self._request(),
                "call_id": self._world.call_id,
                "match_id": match_id,
                "costs": [{"category": category, "amount_pence": pence} for category, pence in COSTS],
                "declaration": DECLARATION,
            },
            key="firm",
            later=("MATCH_UNKNOWN",),
            refusals=("MFA_LIMIT",),
        )
        if "refused" in application:
            return
        path = f"/v1/applications/{application['id']}"
        grant = application["assessment"]["max_grant_pence"]
        pledge = {
            "request_id": self._request(),
            "co_investor": "The firm",
            "kind": "cash",
            "amount_pence": cost - grant,
        }
        pledge_id = (await self.call("funding", "POST", f"{path}/pledges", pledge, key="firm"))["id"]
        await self.call("funding", "POST", f"{path}/pledges/{pledge_id}/confirm", {"evidence": "letter"})
        refusals = ("BUDGET_EXHAUSTED", "MFA_LIMIT")
        submitted = await self.call("funding", "POST", f"{path}/submit", {}, key="firm", refusals=refusals)
        if "refused" in submitted:
            return
        decision = {"award": True, "reason": "Every rule is met"}
        decided = await self.call("funding", "POST", f"{path}/decide", decision, refusals=refusals)
        if "refused" in decided:
            return
        award = decided["award"]
        self._told.awards[award["id"]] = award["grant_pence"]
        await self._be_paid(f"/v1/awards/{award['id']}")

    async def _be_paid(self, path: str) -> None:
        day = today(SystemClock())
        ends = (day + timedelta(days=90)).isoformat()
        dates = {"project_start": day.isoformat(), "project_end": ends}
        await self.call("funding", "POST", f"{path}/accept", dates, key="firm")
        confirmation = {"elsewhere_pence": 0, "statement": "None, says the owner"}
        await self.call("funding", "POST", f"{path}/confirm-assistance", confirmation, key="firm")
        name = self._request()
        claim = {
            "request_id": name,
            "period_start": day.isoformat(),
            "period_end": day.isoformat(),
            "costs": [{"category": "labour", "amount_pence": self._rng.randrange(1, 1_000_00), "evidence": name}],
        }
        claims = (await self.call("funding", "POST", f"{path}/claims", claim, key="firm"))["claims"]
        claim_path = f"{path}/claims/{claims[-1]['id']}"
        await self.call("funding", "POST", f"{claim_path}/decide", {"accept": True, "reason": "papers seen"})
        settlement = {"release": True, "reason": "checked"}
        settled = await self.call("funding", "POST", f"{claim_path}/settle", settlement, key="second")
        for each in settled["claims"]:
            if each["state"] == "paid":
                self._told.paid[each["id"]] = each["decision"]["payable_pence"]


async def until_ended(works: Collection[Awaitable[None]], broken: list[str]) -> None:
    """Run them all; what fails is noted, and the others go on."""
    results = await asyncio.gather(*works, return_exceptions=True)
    broken.extend(f"{type(one).__name__}: {one}"[:500] for one in results if isinstance(one, BaseException))
