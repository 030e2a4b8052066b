"""Every topic of the hub: its owner is the second word of its name."""

from dataclasses import dataclass
from typing import Final

DAY_MS: Final = 24 * 60 * 60 * 1000


@dataclass(frozen=True)
class Topic:
    name: str
    # 0: as many as the setting kafka_partitions says.
    partitions: int
    # None: compacted, the newest record of each key is kept for ever.
    retention_ms: int | None


SAMPLES: Final = "smdih.ingest.samples.v1"
QUARANTINE: Final = "smdih.ingest.quarantine.v1"
DIRECTORY: Final = "smdih.ingest.directory.v1"
BIRTHS: Final = "smdih.ingest.births.v1"
ALARMS: Final = "smdih.anomaly.alarms.v1"
OFFERS: Final = "smdih.matching.offers.v1"
BOOKINGS: Final = "smdih.matching.bookings.v1"
ROOMS: Final = "smdih.matching.rooms.v1"
MATCHES: Final = "smdih.matching.matches.v1"
AWARDS: Final = "smdih.funding.awards.v1"

# Consumers put what they cannot read here: the topic's name with this behind it.
DEAD_LETTERS_SUFFIX: Final = ".dlq"

TOPICS: Final = (
    Topic(SAMPLES, partitions=0, retention_ms=7 * DAY_MS),
    Topic(QUARANTINE, partitions=1, retention_ms=90 * DAY_MS),
    # One partition: every reader replays it whole, in order.
    Topic(DIRECTORY, partitions=1, retention_ms=None),
    # A partition for each share of the firms; its reader in the bridge's group is who serves the share.
    Topic(BIRTHS, partitions=8, retention_ms=None),
    Topic(ALARMS, partitions=4, retention_ms=90 * DAY_MS),
    Topic(OFFERS, partitions=4, retention_ms=90 * DAY_MS),
    Topic(BOOKINGS, partitions=1, retention_ms=365 * DAY_MS),
    # One partition: every reader replays it whole, in order.
    Topic(ROOMS, partitions=1, retention_ms=None),
    Topic(MATCHES, partitions=1, retention_ms=365 * DAY_MS),
    Topic(AWARDS, partitions=1, retention_ms=365 * DAY_MS),
    *(
        Topic(name + DEAD_LETTERS_SUFFIX, partitions=1, retention_ms=90 * DAY_MS)
        for name in (SAMPLES, QUARANTINE, ALARMS, OFFERS, AWARDS)
    ),
)
