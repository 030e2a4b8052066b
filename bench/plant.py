"""Machines and frames for the benchmarks, put into a fresh hub without going through its doors one by one."""

from dataclasses import dataclass

import asyncpg
import numpy as np

from services.common import topics
from services.common.clock import SystemClock
from services.common.directory import entity_key
from services.common.identity import Role
from services.common.kafka import Cluster, Message, Publisher
from services.ingest.domain import QUOTA_SAMPLES_PER_S_MAX
from services.ingest.historian.binarycopy import Floats, Ints
from services.ingest.registry.credentials import make_credential
from smdih.directory.v1 import directory_pb2 as pb

SIGNALS = 20
REGISTER_AT_ONCE = 2_000


@dataclass(frozen=True)
class Plant:
    """A firm with machines of SIGNALS signals each, and a device key."""

    firm_id: int
    machine_ids: list[int]
    key: str

    def path(self, machine_id: int) -> str:
        return f"bench/works/m{machine_id}"


async def register(dsn: str, cluster: Cluster, machines: int) -> Plant:
    """Registers a firm and its machines in one go: the tables by set, the directory by batches."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "ingest,public"})
    now_us = SystemClock().now_us()
    try:
        firm_id = await connection.fetchval(
            "INSERT INTO firm (name, slug, sic, region, size) VALUES ('Bench', 'bench', '25.62', 'Wales', 'large') "
            "ON CONFLICT (slug) DO UPDATE SET name = excluded.name RETURNING id"
        )
        site_id = await connection.fetchval(
            "INSERT INTO site (firm_id, slug, name, timezone) VALUES ($1, 'works', 'Works', 'UTC') "
            "ON CONFLICT (firm_id, slug) DO UPDATE SET name = excluded.name RETURNING id",
            firm_id,
        )
        first = await connection.fetchval("SELECT coalesce(max(id), 0) FROM machine")
        rows = await connection.fetch(
            "INSERT INTO machine (firm_id, site_id, path, name, kind) "
            "SELECT $1, $2, 'bench/works/m' || n, 'm' || n, 'bench' FROM generate_series($3::bigint, $4::bigint) n RETURNING id",
            *(firm_id, site_id, first + 1, first + machines),
        )
        ids = [row["id"] for row in rows]
        signals = await connection.fetch(
            "INSERT INTO signal (firm_id, machine_id, position, name, unit) "
            "SELECT $1, m, p, 's' || p, '' FROM unnest($2::bigint[]) m, generate_series(0, $3 - 1) p "
            "RETURNING id, machine_id, position",
            *(firm_id, ids, SIGNALS),
        )
        key, credential = make_credential(Role.DEVICE, firm_id, 0, "bench", now_us)
        credential.id = await connection.fetchval("SELECT coalesce(max(id), 0) + 1000000 FROM credential")
    finally:
        await connection.close()
    entries = {machine: pb.Machine(id=machine, firm_id=firm_id, site_id=site_id, kind="bench") for machine in ids}
    for machine in ids:
        entries[machine].path = f"bench/works/m{machine}"
        entries[machine].name = f"m{machine}"
        entries[machine].signals.extend(pb.Signal() for _ in range(SIGNALS))
    for row in signals:
        signal = entries[row["machine_id"]].signals[row["position"]]
        signal.id, signal.name = row["id"], f"s{row['position']}"
    messages = [
        Message(
            topics.DIRECTORY,
            pb.DirectoryEntry(machine=machine, changed_us=now_us).SerializeToString(),
            entity_key("machine", machine_id).encode(),
        )
        for machine_id, machine in entries.items()
    ]
    firm = pb.Firm(id=firm_id, name="Bench", slug="bench", sic="25.62", region="Wales", size="large")
    firm.quota.samples_per_s = QUOTA_SAMPLES_PER_S_MAX
    messages.append(
        Message(
            topics.DIRECTORY,
            pb.DirectoryEntry(firm=firm, changed_us=now_us).SerializeToString(),
            entity_key("firm", firm_id).encode(),
        )
    )
    messages.append(
        Message(
            topics.DIRECTORY,
            pb.DirectoryEntry(credential=credential, changed_us=now_us).SerializeToString(),
            entity_key("credential", credential.id).encode(),
        )
    )
    async with Publisher(cluster) as publisher:
        for start in range(0, len(messages), REGISTER_AT_ONCE):
            await publisher.publish_all(messages[start : start + REGISTER_AT_ONCE])
    return Plant(firm_id, ids, key)


def frames(rows: int, seed: int = 1) -> Floats:
    """rows x SIGNALS values as machines have them: a level each, some noise, two decimals."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(50, 5, (rows, SIGNALS)) + np.arange(SIGNALS) * 10, 2)


def seconds(rows: int, start_us: int) -> Ints:
    return start_us + np.arange(rows, dtype=np.int64) * 1_000_000
