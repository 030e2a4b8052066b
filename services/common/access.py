"""What each process does in Kafka and in the database: everything else is refused to it.

The one list: the rules of the brokers (`rules`), users in Kubernetes and the roles of the database follow from it.
`python -m services.common.access` prints the rules as lines for Kafka's own `kafka-acls.sh`, for brokers that nothing else manages.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from services.common import topics


class Operation(StrEnum):
    """Kafka's words; reading and writing a topic each include describing it."""

    READ = "Read"
    WRITE = "Write"
    CREATE = "Create"
    DESCRIBE = "Describe"


class Resource(StrEnum):
    TOPIC = "topic"
    GROUP = "group"


@dataclass(frozen=True)
class Rule:
    """One thing that a user may do; names are literal, never patterns."""

    resource: Resource
    name: str
    operation: Operation


@dataclass(frozen=True)
class Access:
    """What one process needs. No process is a transactional producer, and Faust keeps no tables, so none has topics of its own.

    `follows`: read whole, in no group. `consumes`: read in groups, topics by group; what cannot be read goes to dead letters.
    `shares`: groups that only share out the partitions of a topic (a reader's own reading is in `follows`).
    """

    process: str
    # Also the name of its role in the database; empty: it has no database.
    schema: str
    follows: frozenset[str] = frozenset()
    consumes: dict[str, str] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    publishes: frozenset[str] = frozenset()
    creates: frozenset[str] = frozenset()

    @property
    def user(self) -> str:
        """As whom it comes to the brokers."""
        return f"smdih-{self.process}"

    @property
    def reads(self) -> frozenset[str]:
        return self.follows | frozenset(self.consumes.values()) | frozenset(self.shares.values())

    @property
    def writes(self) -> frozenset[str]:
        dead_letters = {name + topics.DEAD_LETTERS_SUFFIX for name in self.consumes.values()}
        return self.publishes | dead_letters

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(self.consumes) | frozenset(self.shares)


ACCESSES: Final = (
    Access(
        "door",
        "ingest",
        follows=frozenset({topics.DIRECTORY, topics.ROOMS}),
        publishes=frozenset({topics.SAMPLES, topics.QUARANTINE, topics.DIRECTORY}),
    ),
    Access(
        "historian",
        "ingest",
        consumes={"smdih.ingest.historian": topics.SAMPLES, "smdih.ingest.quarantine": topics.QUARANTINE},
    ),
    Access(
        "mqtt-bridge",
        "ingest",
        follows=frozenset({topics.DIRECTORY, topics.BIRTHS}),
        shares={"smdih.ingest.mqtt": topics.BIRTHS},
        publishes=frozenset({topics.SAMPLES, topics.QUARANTINE, topics.BIRTHS}),
    ),
    Access(
        "anomaly-worker",
        "anomaly",
        follows=frozenset({topics.DIRECTORY}),
        consumes={"smdih.anomaly.worker": topics.SAMPLES},
    ),
    Access(
        "anomaly",
        "anomaly",
        follows=frozenset({topics.DIRECTORY, topics.ALARMS}),
        publishes=frozenset({topics.ALARMS}),
    ),
    Access("anomaly-notifier", "anomaly"),
    Access(
        "matching",
        "matching",
        follows=frozenset({topics.DIRECTORY}),
        consumes={"smdih.matching.needs": topics.ALARMS},
        publishes=frozenset({topics.OFFERS, topics.BOOKINGS, topics.ROOMS, topics.MATCHES}),
    ),
    Access(
        "funding",
        "funding",
        follows=frozenset({topics.DIRECTORY}),
        consumes={"smdih.funding.matches": topics.OFFERS},
        publishes=frozenset({topics.AWARDS}),
    ),
    # Comes before the others and owns what it makes in the database.
    Access("migrate", "", creates=frozenset(topic.name for topic in topics.TOPICS)),
    # After a disaster, while no other process runs: compares positions with what the topics hold, tells what the database knows.
    Access(
        "reconcile",
        "",
        follows=frozenset(
            {topics.SAMPLES, topics.QUARANTINE, topics.ALARMS, topics.OFFERS, topics.DIRECTORY, topics.ROOMS}
        ),
        publishes=frozenset({topics.DIRECTORY, topics.ROOMS}),
    ),
)


def access_of(process: str) -> Access:
    """Raises KeyError."""
    return {access.process: access for access in ACCESSES}[process]


def rules(access: Access, *, prefix: str = "") -> tuple[Rule, ...]:
    """What the brokers must allow the process; the prefix is that of the hub's topics and groups."""
    return tuple(sorted(_rules(access, prefix), key=lambda rule: (rule.resource, rule.name, rule.operation)))


def _rules(access: Access, prefix: str) -> Iterator[Rule]:
    for name in access.reads:
        yield Rule(Resource.TOPIC, prefix + name, Operation.READ)
    for name in access.writes:
        yield Rule(Resource.TOPIC, prefix + name, Operation.WRITE)
    for name in access.creates:
        yield Rule(Resource.TOPIC, prefix + name, Operation.CREATE)
        yield Rule(Resource.TOPIC, prefix + name, Operation.DESCRIBE)
    for name in access.groups:
        yield Rule(Resource.GROUP, prefix + name, Operation.READ)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m services.common.access [PREFIX-OF-TOPICS]", file=sys.stderr)  # noqa: T201  a command line
        sys.exit(2)
    for access in ACCESSES:
        for rule in rules(access, prefix="".join(arguments)):
            print(  # noqa: T201  a command line
                f"--add --allow-principal User:{access.user} --operation {rule.operation} --{rule.resource} {rule.name}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
