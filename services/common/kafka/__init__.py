"""Kafka at its edges: making topics, publishing durably, and consuming with the position in the database."""

from services.common.kafka.attempts import Attempts
from services.common.kafka.cluster import REQUEST_BYTES_MAX, Cluster, Identity, create_topics, stop_consumer
from services.common.kafka.consuming import (
    RETRY_DELAY_S_MAX,
    Fenced,
    PositionedConsumer,
    consumed_total,
    show_consumer,
)
from services.common.kafka.deadletters import DEAD_LETTERS_IN_A_ROW_MAX, DeadLetters, Poison, TooManyDeadLetters
from services.common.kafka.ends import TopicEnds
from services.common.kafka.following import Followed
from services.common.kafka.positions import FirstOffsets, MadeAnew, Position, load_positions
from services.common.kafka.publishing import Message, Publisher
from services.common.kafka.topicids import topic_ids

__all__ = [
    "DEAD_LETTERS_IN_A_ROW_MAX",
    "REQUEST_BYTES_MAX",
    "RETRY_DELAY_S_MAX",
    "Attempts",
    "Cluster",
    "DeadLetters",
    "Fenced",
    "FirstOffsets",
    "Followed",
    "Identity",
    "MadeAnew",
    "Message",
    "Poison",
    "Position",
    "PositionedConsumer",
    "Publisher",
    "TooManyDeadLetters",
    "TopicEnds",
    "consumed_total",
    "create_topics",
    "load_positions",
    "show_consumer",
    "stop_consumer",
    "topic_ids",
]
