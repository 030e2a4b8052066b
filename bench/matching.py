"""Matching: one need routed among 5,000 providers, in process and over gRPC, and a round of 10,000 needs."""

import asyncio
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import numpy as np

from bench import judged
from bench.report import tell
from localstack.hub import Hub
from localstack.servers import LOCAL, Servers
from services.common.database import create_pool, transaction
from services.matching.assignment import assign, over_committed, round_of
from services.matching.assignment_bound import optimal_quality
from services.matching.domain import Kind, Need, Provider, Size, Urgency
from services.matching.providers import ProviderRecord
from services.matching.ranking import Ranker
from services.matching.rounds import FLOOR, place_needs
from services.matching.store import providers as store
from services.matching.text import Embedder, Vectors
from smdih.matching.v1 import matching_pb2, matching_pb2_grpc

PROVIDERS, ROUND_NEEDS = 5_000, 10_000
NEED_WORDS = 40
# Needs whose routing is timed, after some that warm up.
ROUTED, WARM = 400, 20
# Distinct texts that are embedded; the vectors of the others are near to one of these.
EMBEDDED = 300
ROUTE_MS_GOAL, ROUTE_GRPC_MS_GOAL, ROUND_S_GOAL = 15.0, 30.0, 2.0
# Of the best total score that any assignment could reach, stable or not.
ROUND_QUALITY_LEAST = 0.995

_VOCABULARY = """
gearbox spindle extruder press kiln robot conveyor pump compressor lathe mill furnace mixer boiler chiller palletiser feeder
oven grinder welder laser printer crusher dryer separator filler capper labeller turbine crane

vibration drift wear leakage noise scrap downtime overheating cracks misalignment jams contamination rework corrosion waste
blockages imbalance splits delays shortages porosity warping dust burrs scratches variation chatter

monitoring modelling statistics sensors vision thermography scheduling simulation dashboards forecasting training calibration
metrology automation inspection acoustics spectroscopy optimisation clustering regression retrofit edge computing databases
visualisation planning digital twins analytics machine learning quality control

we our line often stops during night shift and nobody knows why since last spring when orders grew operators check it by hand
twice a day results differ between teams customers complain about late deliveries cost keeps rising want help
"""
_MACHINES, _TROUBLES, _METHODS, _PLAIN = (words.split() for words in _VOCABULARY.strip().split("\n\n"))
_REGIONS = ("East Midlands", "Wales", "Scotland", "North West", "South East", "London", "Northern Ireland", "Online")


_SYLLABLES = (
    "ba",
    "de",
    "fi",
    "ko",
    "lu",
    "ma",
    "ne",
    "pi",
    "ro",
    "su",
    "ta",
    "ve",
    "wi",
    "zo",
    "cra",
    "ple",
    "stri",
    "gno",
)
# Rare words, as names and terms of a trade are: the one in place n comes up about 1/n as often as the first.
_RARE = ["".join(random.Random(n).choices(_SYLLABLES, k=3)) for n in range(6_000)]
_RARE_WEIGHTS = list(itertools.accumulate(1 / (10 + n) for n in range(len(_RARE))))


def _text(rng: random.Random, words: int) -> str:
    """Half of it common words of the trade and of everyday speech, half rare ones."""
    parts = [_MACHINES, _TROUBLES, _METHODS, _PLAIN]
    common = [rng.choice(parts[number % len(parts)]) for number in range(words // 2)]
    rare = rng.choices(_RARE, cum_weights=_RARE_WEIGHTS, k=words - len(common))
    mixed = [*common, *rare]
    rng.shuffle(mixed)
    return " ".join(mixed).capitalize() + "."


def records(rng: random.Random) -> list[ProviderRecord]:
    made: list[ProviderRecord] = []
    for number in range(PROVIDERS):
        kind = rng.choices(list(Kind), [55, 25, 15, 5])[0]
        made.append(
            ProviderRecord(
                id=f"bench-{number:05d}",
                kind=kind,
                partner_id=1,
                title=_text(rng, 5),
                text=_text(rng, rng.randint(25, 60)),
                region=rng.choice(_REGIONS),
                sic_divisions=tuple(rng.sample([str(division) for division in range(10, 34)], 3)),
                capacity_per_quarter=None if kind is Kind.COURSE else rng.randint(1, 5),
            )
        )
    return made


def needs(rng: random.Random, count: int) -> list[Need]:
    return [
        Need(
            id=f"need-{number:05d}",
            text=_text(rng, NEED_WORDS),
            sic=f"{rng.randint(10, 33)}.10",
            region=rng.choice(_REGIONS[:-1]),
            size=rng.choice(list(Size)),
            urgency=rng.choice(list(Urgency)),
            firm_id=str(rng.randrange(1000)),
        )
        for number in range(count)
    ]


def vectors(embedder: Embedder, texts: Sequence[str], seed: int) -> Vectors:
    """Unit vectors: some embedded for real, the others near to one of them. Only their number matters here."""
    real = embedder.embed(texts[:EMBEDDED])
    noise = np.random.default_rng(seed).normal(0, 0.03, (len(texts), real.shape[1])).astype(np.float32)
    mixed = real[np.arange(len(texts)) % len(real)] + noise
    mixed[: len(real)] = real
    return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), dtype=np.float32)


@contextmanager
def one_core() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def percentile(times_s: Sequence[float], share: float) -> float:
    return float(np.percentile(np.array(times_s) * 1000, share))


def route_need(ranker: Ranker) -> None:
    """Text in, explained ranking out, on one core; every text is new."""
    times: list[float] = []
    computed: list[float] = []
    with one_core():
        for need in needs(random.Random(2), ROUTED + WARM):
            began, worked = time.perf_counter(), time.thread_time()
            ranker.rank(need, limit=20)
            times.append(time.perf_counter() - began)
            computed.append(time.thread_time() - worked)
    times, computed = times[WARM:], computed[WARM:]
    tell(
        "route_need_p99_ms",
        percentile(times, 99),
        "ms",
        ROUTE_MS_GOAL,
        p50_ms=round(percentile(times, 50), 2),
        # Without the time that others had the core.
        computed_p50_ms=round(percentile(computed, 50), 2),
        computed_p99_ms=round(percentile(computed, 99), 2),
        providers=PROVIDERS,
        words=NEED_WORDS,
        needs=ROUTED,
    )


def matching_round(ranker: Ranker, embedder: Embedder, known: dict[str, Provider]) -> None:
    """Scores of all pairs and the stable assignment, vectors ready; the checks and explanations of a real round apart."""
    waiting = needs(random.Random(3), ROUND_NEEDS)
    questions = vectors(embedder, [need.text for need in waiting], 3)
    ids = sorted(known)
    capacity = np.array([known[each].places_left for each in ids], dtype=np.int64)
    began, worked = time.perf_counter(), time.process_time()
    problem = round_of(
        need_ids=[need.id for need in waiting],
        provider_ids=ids,
        capacity=capacity,
        safety_net=np.array([known[each].kind.is_safety_net for each in ids], dtype=np.bool_),
        scores=lambda block: ranker.score_table(waiting[block], questions[block], ids),
        floor=FLOOR,
    )
    scored_s = time.perf_counter() - began
    assignment = assign(problem)
    took_s, worked_s = time.perf_counter() - began, time.process_time() - worked
    assert not over_committed(problem, assignment)
    began = time.perf_counter()
    outcome = place_needs(ranker, waiting, questions, providers=known, out={})
    assert not outcome.blocking_pairs
    tell(
        "matching_round_s",
        took_s,
        "s",
        ROUND_S_GOAL,
        scores_s=round(scored_s, 2),
        assignment_s=round(took_s - scored_s, 2),
        # Of all cores, without the time that others had them.
        computed_s=round(worked_s, 2),
        whole_round_s=round(time.perf_counter() - began, 2),
        needs=ROUND_NEEDS,
        providers=PROVIDERS,
        placed=len(assignment.offers),
        unplaced=len(assignment.unserved),
        blocking_pairs=outcome.blocking_pairs,
    )
    best = optimal_quality(problem, assignment)
    tell(
        "matching_round_quality",
        assignment.quality / best,
        "share of the optimum, at least the limit",
        ROUND_QUALITY_LEAST,
        quality=round(assignment.quality, 1),
        optimum=round(best, 1),
        needs=ROUND_NEEDS,
        places=int(capacity[capacity <= ROUND_NEEDS].sum()),
    )


async def route_need_grpc(servers: Servers, made: list[ProviderRecord], ready: Vectors, model_id: str) -> None:
    """OpenNeed against the running service: ranked, stored with its offers, events in the outbox, answered."""
    hub = Hub(servers, LOCAL / "log" / "bench", topic_prefix="bench-matching.", roles=("door", "matching"))
    try:
        await hub.start()
        await _store_providers(hub.settings.database_dsn, made, ready, model_id)
        key = await _firm_key(hub)
        await _all_known(hub)
        times: list[float] = []
        async with grpc.aio.insecure_channel(hub.processes["matching"].grpc) as channel:
            stub = matching_pb2_grpc.MatchingServiceStub(channel)
            for need in needs(random.Random(5), ROUTED + WARM):
                began = time.perf_counter()
                opened = await stub.OpenNeed(
                    matching_pb2.OpenNeedRequest(text=need.text), metadata=(("authorization", f"Bearer {key}"),)
                )
                times.append(time.perf_counter() - began)
                assert opened.offers
        times = times[WARM:]
        tell(
            "route_need_grpc_p99_ms",
            percentile(times, 99),
            "ms",
            ROUTE_GRPC_MS_GOAL,
            p50_ms=round(percentile(times, 50), 2),
            providers=PROVIDERS,
            words=NEED_WORDS,
            needs=ROUTED,
        )
    finally:
        await hub.stop()


async def _store_providers(dsn: str, made: list[ProviderRecord], ready: Vectors, model_id: str) -> None:
    pool = await create_pool(dsn, schema="matching", size_max=1)
    try:
        async with transaction(pool) as connection:
            for record in made:
                change = await store.next_provider_change(connection)
                changed = await connection.fetchval("SELECT now()")
                await store.put_provider(connection, replace(record, change=change, changed=changed))
            rows = [(record, ready[number].astype("<f4").tobytes()) for number, record in enumerate(made)]
            await store.keep_vectors(connection, rows, vector_model=model_id)
    finally:
        await pool.close()


async def _firm_key(hub: Hub) -> str:
    headers = {"Authorization": f"Bearer {hub.operator_key}"}
    async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=30) as client:
        firm = {"name": "Bench", "slug": f"bench-{os.getpid()}", "sic": "28.15", "region": "Wales", "size": "small"}
        firm_id = (await client.post("/v1/firms", json=firm)).json()["id"]
        made = await client.post("/v1/credentials", json={"role": "firm", "firm_id": firm_id})
        key: str = made.json()["key"]
        return key


async def _all_known(hub: Hub) -> None:
    """Wait until the service has read every provider."""
    async with httpx.AsyncClient(base_url=hub.processes["matching"].http, timeout=30) as client:
        while f"smdih_matching_providers {float(PROVIDERS)}" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.2)


async def run(servers: Servers) -> None:
    embedder = await asyncio.to_thread(Embedder.installed)
    assert embedder is not None, "the sentence model is not installed"
    if folder := os.environ.get("SMDIH_BENCH_JUDGED"):
        judged.run(Path(folder), embedder)
    made = records(random.Random(1))
    known = {record.id: record.for_ranking() for record in made}
    ready = vectors(embedder, [provider.profile for provider in known.values()], 1)
    ranker = Ranker(embedder)
    for number, provider in enumerate(known.values()):
        ranker.upsert(provider, ready[number])
    route_need(ranker)
    matching_round(ranker, embedder, known)
    await route_need_grpc(servers, made, ready, ranker.model_id)
