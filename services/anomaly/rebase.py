"""Detector states and tunings set onto a samples topic that begins anew, after Kafka was lost. Nothing else may run meanwhile."""

from collections.abc import Mapping

from services.common.database import Connection


async def rebase(connection: Connection, firsts: Mapping[int, int]) -> None:
    """`firsts`: partition -> the offset of its first record to come.

    A tuning that a machine's state holds already stays below that offset, the others hold from it on (decision 0011).
    """
    for partition, first in firsts.items():
        await connection.execute(
            "UPDATE tuning_start s SET from_offset = CASE WHEN s.from_offset < ("
            "  SELECT min(d.next_offset) FROM detector_state d WHERE d.partition = s.partition AND d.machine_id = t.machine_id"
            ") THEN $2 - 1 ELSE $2 END FROM tuning t WHERE t.id = s.tuning_id AND s.partition = $1",
            *(partition, first),
        )
        await connection.execute("UPDATE detector_state SET next_offset = $2 WHERE partition = $1", partition, first)
        await connection.execute("UPDATE horizon SET next_offset = $2 WHERE partition = $1", partition, first)
