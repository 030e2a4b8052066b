"""What comes in at each door, what is put aside, and how fast it is stored."""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, tile
from deploy.grafana.queries import by, grown, half_and_worst, or_none, total


def ingest() -> build.Dashboard:
    return board(
        "smdih-ingest",
        "SMDIH: ingest and historian",
        "What comes in at each door, what is put aside and why, and how fast it is stored.",
        [
            Part(
                "Is it healthy?",
                [
                    tile(
                        "Taken",
                        total("smdih_ingest_door_samples_total", '{outcome="accepted"}'),
                        why="Samples a second that the doors accept.",
                        unit="cps",
                    ),
                    tile(
                        "Stored",
                        total("smdih_ingest_historian_samples_total"),
                        why="Samples a second that the historian stores.",
                        unit="cps",
                    ),
                    tile(
                        "Put aside",
                        'sum(rate(smdih_ingest_door_samples_total{outcome="quarantined"}[15m])) '
                        "/ clamp_min(sum(rate(smdih_ingest_door_samples_total[15m])), 1e-9)",
                        why="Share of samples that went to quarantine; they can be replayed.",
                        unit="percentunit",
                        decimals=2,
                        levels=((None, GOOD), (0.01, WARN), (0.05, BAD)),
                        section="quarantinerate",
                    ),
                    tile(
                        "Behind",
                        'max(smdih_kafka_stalled_seconds{group=~"smdih.ingest.+"})',
                        why="For how long a consumer of ingest has had work and stored nothing.",
                        unit="s",
                        levels=((None, GOOD), (10, WARN), (60, BAD)),
                        section="consumerstalled",
                    ),
                    tile(
                        "Missing",
                        "max(smdih_ingest_missing_batches)",
                        why="Acknowledged batches that never came out of the message log, by the doors' own numbers.",
                        levels=NONE_IS_GOOD,
                        section="samplesmissing",
                    ),
                    tile("Machines", "sum(smdih_ingest_machines)", why="With samples of the last 24 hours."),
                ],
            ),
            Part(
                "Doors",
                [
                    lines(
                        "Samples, by door and outcome",
                        (by("smdih_ingest_door_samples_total", "door", "outcome"), "{{door}} {{outcome}}"),
                        why="accepted: in the message log; quarantined: put aside; refused: the sender keeps them.",
                        unit="cps",
                    ),
                    lines(
                        "Requests, by door",
                        (by("smdih_ingest_door_requests_total", "door"), "{{door}}"),
                        why="Requests and stream messages.",
                        unit="reqps",
                    ),
                    lines(
                        "On their way to the message log",
                        ('sum(smdih_queue_bytes{queue="door"})', "waiting"),
                        ('sum(smdih_queue_limit_bytes{queue="door"})', "limit"),
                        why="Bytes that the doors have taken and Kafka does not hold yet. At the limit they answer SLOW_DOWN.",
                        unit="bytes",
                        section="queuefull",
                    ),
                    lines(
                        "Batches in a record",
                        (
                            f"{total('smdih_ingest_door_batches_total')} / clamp_min({total('smdih_ingest_door_records_total')}, 1e-9)",
                            "batches",
                        ),
                        why="How full the group commit is: 1 when quiet, hundreds when busy.",
                    ),
                    lines(
                        "Put aside, by reason",
                        (or_none(by("smdih_ingest_door_quarantined_samples_total", "reason")), "{{reason}}"),
                        why="Samples a second into quarantine.",
                        unit="cps",
                        section="quarantinerate",
                    ),
                    lines(
                        "Keys refused",
                        (or_none(by("smdih_ingest_keys_refused_total", "reason")), "{{reason}}"),
                        why="Keys that may not come in.",
                        unit="reqps",
                    ),
                ],
            ),
            Part(
                "Historian",
                [
                    lines(
                        "From receipt to the database",
                        *half_and_worst("smdih_ingest_historian_delay_seconds"),
                        why="Of the oldest samples of each poll.",
                        unit="s",
                        levels=((None, GOOD), (5, BAD)),
                        section="freshness",
                    ),
                    lines(
                        "Time to store a poll",
                        *half_and_worst("smdih_ingest_historian_store_seconds"),
                        why="From bytes to rows, without the commit.",
                        unit="s",
                    ),
                    lines(
                        "The way into the database",
                        (by("smdih_ingest_historian_samples_total", "way"), "{{way}}"),
                        why="in_order goes by COPY; merged is late, repeated or corrected, and costs more.",
                        unit="cps",
                        stacked=True,
                    ),
                    lines(
                        "Age of the newest stored sample",
                        ("max by (quantile) (smdih_ingest_freshness_seconds)", "{{quantile}} of machines"),
                        why="Over the machines that sent within a day; 1.0 is the one furthest behind.",
                        unit="s",
                        section="freshness",
                    ),
                    lines(
                        "Lag",
                        ('sum by (group, topic) (smdih_kafka_lag_records{group=~"smdih.ingest.+"})', "{{topic}}"),
                        why="Records not yet taken in.",
                        section="consumerbehind",
                    ),
                    lines(
                        "Dead letters",
                        ("sum by (topic) (increase(smdih_kafka_dead_letters_total[1h]))", "{{topic}}"),
                        why="Records that no consumer could read, in the last hour; they stand in the topic's .dlq.",
                        section="deadletters",
                    ),
                ],
            ),
            Part(
                "MQTT bridge",
                [
                    lines(
                        "Messages",
                        (
                            or_none(by("smdih_ingest_mqtt_messages_total", "form", "outcome")),
                            "{{form}} {{outcome}}",
                        ),
                        why="taken: in the message log; again: Kafka did not answer, and the broker keeps them. 0 without a bridge.",
                        unit="cps",
                    ),
                    lines(
                        "Sparkplug nodes online",
                        ("sum(smdih_ingest_mqtt_nodes_online) or vector(0)", "nodes"),
                        ("sum(rate(smdih_ingest_mqtt_rebirths_total[5m])) * 300 or vector(0)", "rebirths in 5 min"),
                        why="Nodes that said that they are alive, and how often one was asked to say again what it has.",
                    ),
                    lines(
                        "Shares of the firms that are served",
                        ("sum(smdih_ingest_mqtt_shares_connected) or vector(0)", "shares"),
                        why="There are eight; fewer for long means that a bridge is missing or cannot reach its broker.",
                    ),
                ],
            ),
            Part(
                "Storage",
                [
                    lines(
                        "Size of the tables",
                        ("max by (resolution) (smdih_ingest_storage_bytes)", "{{resolution}}"),
                        ("max(smdih_ingest_database_bytes)", "whole database"),
                        why="With indexes.",
                        unit="bytes",
                        width=12,
                        section="diskfull",
                    ),
                    lines(
                        "Retention",
                        (
                            grown("smdih_ingest_retention_rows_total", "resolution", over="6h"),
                            "{{resolution}}",
                        ),
                        why="Rows removed in six hours.",
                        width=12,
                    ),
                ],
            ),
            Part(
                "Reading",
                [
                    lines(
                        "Answers, by route",
                        (
                            'topk(10, sum by (route) (rate(smdih_http_requests_total{route=~"/v1/.+"}[5m])))',
                            "{{route}}",
                        ),
                        why="The ten busiest routes.",
                        unit="reqps",
                        width=12,
                    ),
                    lines(
                        "Slowest routes (95 %)",
                        (
                            'topk(10, histogram_quantile(0.95, sum by (le, route) (rate(smdih_http_request_seconds_bucket{route=~"/v1/.+"}[5m]))))',
                            "{{route}}",
                        ),
                        why="The ten slowest routes.",
                        unit="s",
                        width=12,
                    ),
                ],
            ),
        ],
    )
