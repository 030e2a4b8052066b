"""The dashboards of those who run the hub: the whole at a glance, and each of its parts. All on Prometheus.

What one process did is summed over the processes; what is counted in the database is the same in each, so it is `max`.
"""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, rows_of, tile

RATE = "[$__rate_interval]"


def by(metric: str, *labels: str, where: str = "") -> str:
    """Per second, summed by labels."""
    return f"sum by ({', '.join(labels)}) (rate({metric}{where}{RATE}))"


def total(metric: str, where: str = "") -> str:
    return f"sum(rate({metric}{where}{RATE}))"


def quantile(share: float, metric: str, *labels: str, where: str = "") -> str:
    of = ", ".join(("le", *labels))
    return f"histogram_quantile({share}, sum by ({of}) (rate({metric}_bucket{where}{RATE})))"


HUBS_FAULT = '{reason=~"TRY_AGAIN|SLOW_DOWN|INTERNAL"}'
AVAILABILITY = (
    f"1 - (sum(rate(smdih_ingest_door_refusals_total{HUBS_FAULT}[1h])) "
    "/ clamp_min(sum(rate(smdih_ingest_door_requests_total[1h])), 1e-9))"
)
FRESHNESS_SLI = (
    'sum(rate(smdih_ingest_historian_delay_seconds_bucket{le="5.0"}[1h])) '
    "/ sum(rate(smdih_ingest_historian_delay_seconds_count[1h]))"
)
ALARM_SLI = (
    'sum(rate(smdih_anomaly_alarm_seconds_bucket{le="10.0"}[1h])) / sum(rate(smdih_anomaly_alarm_seconds_count[1h]))'
)
STEPS_999 = ((None, BAD), (0.999, WARN), (0.9995, GOOD))
STEPS_99 = ((None, BAD), (0.99, WARN), (0.995, GOOD))
LAG_S = (
    "sum by (group, topic) (smdih_kafka_lag_records) "
    "/ clamp_min(sum by (group, topic) (rate(smdih_kafka_consumed_total[5m])), 0.1)"
)


def operator() -> build.Dashboard:
    return board(
        "smdih-operator",
        "SMDIH: is it healthy?",
        "The whole hub at a glance, from the door to the award. Green tiles: go and have tea. Another colour: its corner leads to what to do.",
        [
            Part(
                "Is it healthy?",
                [
                    tile(
                        "Alerts firing",
                        'count(ALERTS{alertname=~"Smdih.+", alertstate="firing"}) or vector(0)',
                        why="Alerts of deploy/prometheus/rules.yml that fire now. 0 is well; each has a section in the runbooks.",
                        levels=NONE_IS_GOOD,
                        section="how-to-use-this-page",
                    ),
                    tile(
                        "Processes up",
                        "sum(smdih_process_info)",
                        why="Processes of the hub that answer Prometheus.",
                        levels=((None, BAD), (1, GOOD)),
                        section="processdown",
                    ),
                    tile(
                        "Door availability, 1 h",
                        AVAILABILITY,
                        why="Share of telemetry requests that were not sent back through the hub's fault. Objective: 99.9 % over 30 days.",
                        unit="percentunit",
                        decimals=2,
                        levels=STEPS_999,
                        section="dooravailability",
                    ),
                    tile(
                        "Stored within 5 s, 1 h",
                        FRESHNESS_SLI,
                        why="Share of the historian's polls whose oldest sample was stored within 5 s of its receipt. Objective: 99 %.",
                        unit="percentunit",
                        decimals=2,
                        levels=STEPS_99,
                        section="freshness",
                    ),
                    tile(
                        "Alarmed within 10 s, 1 h",
                        f"({ALARM_SLI}) or vector(1)",
                        why="Share of alarms stored within 10 s of the receipt of the sample that shows them. Objective: 99 %.",
                        unit="percentunit",
                        decimals=2,
                        levels=STEPS_99,
                        section="alarmlatency",
                    ),
                    tile(
                        "Acknowledged and missing",
                        "max(smdih_ingest_missing_batches) + sum(increase(smdih_anomaly_records_lost_total[1h]))",
                        why="Batches that a door acknowledged and that never came out of the message log. Objective: 0, always.",
                        levels=NONE_IS_GOOD,
                        section="samplesmissing",
                    ),
                ],
            ),
            Part(
                "Telemetry: in, stored, scored",
                [
                    lines(
                        "Samples a second",
                        (total("smdih_ingest_door_samples_total", '{outcome="accepted"}'), "taken at the doors"),
                        (total("smdih_ingest_historian_samples_total"), "stored"),
                        (total("smdih_anomaly_samples_scored_total"), "scored"),
                        why="The three lines lie on each other; where stored or scored is below, the lag grows.",
                        unit="cps",
                    ),
                    lines(
                        "Age of the newest stored sample",
                        (
                            'max by (quantile) (smdih_ingest_freshness_seconds{quantile!="1.0"})',
                            "{{quantile}} of machines",
                        ),
                        why="Now minus the newest stored time, over the machines that sent within a day. Machines that are switched off age, so look at the half (0.5) first.",
                        unit="s",
                        section="freshness",
                    ),
                    lines(
                        "Records not yet taken in",
                        ("sum by (group, topic) (smdih_kafka_lag_records)", "{{group}} of {{topic}}"),
                        why="Lag of each consumer group, in records.",
                        section="consumerbehind",
                    ),
                ],
            ),
            Part(
                "From alarm to award",
                [
                    lines(
                        "Alarms raised",
                        ("sum by (severity) (increase(smdih_anomaly_alarms_raised_total[5m]))", "{{severity}}"),
                        why="In five minutes, by severity.",
                        width=6,
                        stacked=True,
                    ),
                    lines(
                        "Active alarms",
                        ("max by (severity) (smdih_anomaly_alarms_active)", "{{severity}}"),
                        why="Whose condition lasts, on the list.",
                        width=6,
                        stacked=True,
                    ),
                    lines(
                        "Offers open, needs waiting",
                        ("max(smdih_matching_offers_open)", "offers open"),
                        ("max(smdih_matching_needs_waiting)", "needs without an offer"),
                        why="Offers that nobody answered yet, and open needs that nobody could be found for.",
                        width=6,
                    ),
                    lines(
                        "The fund's money",
                        (
                            'max by (account) (smdih_funding_balance_pence{account=~"public_(budget|committed|held|paid)"}) / 100',
                            "{{account}}",
                        ),
                        why="Public money by what it is doing, in pounds (the metric is in pence).",
                        width=6,
                        unit="currencyGBP",
                        stacked=True,
                    ),
                ],
            ),
            Part(
                "Doors and services",
                [
                    lines(
                        "Errors, HTTP and gRPC",
                        (
                            f'sum by (route) (rate(smdih_http_requests_total{{status=~"5.."}}{RATE})) or vector(0)',
                            "HTTP {{route}}",
                        ),
                        (
                            f'sum by (method) (rate(smdih_rpc_calls_total{{status=~"INTERNAL|UNAVAILABLE|UNKNOWN"}}{RATE})) or vector(0)',
                            "gRPC {{method}}",
                        ),
                        why="Answers that say it was the hub's fault.",
                        unit="reqps",
                        section="answersfail",
                    ),
                    lines(
                        "Slowest answers (99 %)",
                        (quantile(0.99, "smdih_http_request_seconds"), "HTTP"),
                        (quantile(0.99, "smdih_rpc_call_seconds"), "gRPC, unary"),
                        why="99 of 100 requests are answered within this time. Streams of watchers are in it, so look at the service's own board for a route.",
                        unit="s",
                    ),
                    lines(
                        "Refused, by reason",
                        (by("smdih_ingest_door_refusals_total", "reason"), "{{reason}}"),
                        why="Telemetry that was sent back. TRY_AGAIN, SLOW_DOWN and INTERNAL are the hub's fault, the others the sender's.",
                        unit="reqps",
                    ),
                ],
            ),
            Part(
                "How full is it?",
                [
                    lines(
                        "Queues, share of their limit",
                        ("max by (queue) (smdih_queue_items / smdih_queue_limit_items)", "{{queue}}"),
                        ("max by (queue) (smdih_queue_bytes / smdih_queue_limit_bytes)", "{{queue}} (bytes)"),
                        why="At 100 % the queue's owner answers SLOW_DOWN.",
                        unit="percentunit",
                        high=1,
                        levels=((None, GOOD), (0.8, BAD)),
                        section="queuefull",
                    ),
                    lines(
                        "Database connections, share of the limit",
                        (
                            'max by (schema) (smdih_database_pool_connections{state="used"} / on (instance, schema) '
                            "smdih_database_pool_connections_limit)",
                            "{{schema}}",
                        ),
                        why="At 100 % requests wait for a connection.",
                        unit="percentunit",
                        high=1,
                        levels=((None, GOOD), (0.9, BAD)),
                        section="poolexhausted",
                    ),
                    lines(
                        "Outbox: age of the oldest event",
                        ("max by (schema) (smdih_outbox_oldest_seconds)", "{{schema}}"),
                        why="Events that are stored and not yet published; they are published in order once Kafka answers.",
                        unit="s",
                        section="outboxold",
                    ),
                    lines(
                        "Memory",
                        (
                            "sum by (process) (process_resident_memory_bytes * on (instance) group_left (process) smdih_process_info)",
                            "{{process}}",
                        ),
                        why="Resident, by kind of process.",
                        unit="bytes",
                    ),
                    lines(
                        "Processor",
                        (
                            f"sum by (process) (rate(process_cpu_seconds_total{RATE}) * on (instance) group_left (process) smdih_process_info)",
                            "{{process}}",
                        ),
                        why="Cores, by kind of process. One process uses one core at most, apart from numerics.",
                    ),
                    lines(
                        "Delay of the event loop (99 %)",
                        (
                            "histogram_quantile(0.99, sum by (le, process) (rate(smdih_process_loop_delay_seconds_bucket[5m]) "
                            "* on (instance) group_left (process) smdih_process_info))",
                            "{{process}}",
                        ),
                        why="How late the process comes back to what waits. Above some tenths of a second it does too much at once.",
                        unit="s",
                        section="loopslow",
                    ),
                ],
            ),
        ],
    )


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
                        (f"({by('smdih_ingest_door_quarantined_samples_total', 'reason')}) or vector(0)", "{{reason}}"),
                        why="Samples a second into quarantine.",
                        unit="cps",
                        section="quarantinerate",
                    ),
                    lines(
                        "Keys refused",
                        (f"({by('smdih_ingest_keys_refused_total', 'reason')}) or vector(0)", "{{reason}}"),
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
                        (quantile(0.5, "smdih_ingest_historian_delay_seconds"), "half"),
                        (quantile(0.99, "smdih_ingest_historian_delay_seconds"), "99 %"),
                        why="Of the oldest samples of each poll.",
                        unit="s",
                        levels=((None, GOOD), (5, BAD)),
                        section="freshness",
                    ),
                    lines(
                        "Time to store a poll",
                        (quantile(0.5, "smdih_ingest_historian_store_seconds"), "half"),
                        (quantile(0.99, "smdih_ingest_historian_store_seconds"), "99 %"),
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
                            f"({by('smdih_ingest_mqtt_messages_total', 'form', 'outcome')}) or vector(0)",
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
                            "(sum by (resolution) (increase(smdih_ingest_retention_rows_total[6h]))) or vector(0)",
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


def anomaly() -> build.Dashboard:
    return board(
        "smdih-anomaly",
        "SMDIH: anomalies and alarms",
        "Whether every sample is scored in time, whether the alarms serve the people who must respond (ISA-18.2), and whether they hear of them.",
        [
            Part(
                "Is it healthy?",
                [
                    tile(
                        "Scored",
                        total("smdih_anomaly_samples_scored_total"),
                        why="Samples a second through the detector.",
                        unit="cps",
                    ),
                    tile(
                        "Behind",
                        'max(smdih_kafka_stalled_seconds{group="smdih.anomaly.worker"})',
                        why="For how long a worker has had work and scored nothing.",
                        unit="s",
                        levels=((None, GOOD), (10, WARN), (60, BAD)),
                        section="consumerstalled",
                    ),
                    tile(
                        "Alarms a firm, worst, 10 min",
                        'max(smdih_anomaly_firm_alarms_10_minutes{quantile="1.0"})',
                        why="The firm with the most alarms. More than 10 in 10 minutes is a flood: more than one person can respond to.",
                        levels=((None, GOOD), (6, WARN), (11, BAD)),
                        section="alarmflood",
                    ),
                    tile(
                        "Firms flooded",
                        "max(smdih_anomaly_firms_flooded)",
                        why="Firms with more than 10 alarms in the last 10 minutes.",
                        levels=NONE_IS_GOOD,
                        section="alarmflood",
                    ),
                    tile(
                        "Stale alarms",
                        "max(smdih_anomaly_alarms_stale)",
                        why="Which last for more than 24 hours: somebody should repair, shelve or tune.",
                        levels=((None, GOOD), (1, WARN)),
                    ),
                    tile(
                        "Messages given up",
                        "max(smdih_anomaly_deliveries_dead)",
                        why="Deliveries that failed 12 times and wait for a person.",
                        levels=NONE_IS_GOOD,
                        section="deliveriesdead",
                    ),
                ],
            ),
            Part(
                "Alarms",
                [
                    lines(
                        "Raised, by severity",
                        ("sum by (severity) (increase(smdih_anomaly_alarms_raised_total[10m]))", "{{severity}}"),
                        why="In ten minutes. A usual share is 80 % low, 15 % medium, 5 % high.",
                        stacked=True,
                    ),
                    lines(
                        "Active, by severity",
                        ("max by (severity) (smdih_anomaly_alarms_active)", "{{severity}}"),
                        ("max(smdih_anomaly_alarms_suppressed)", "kept from the list"),
                        why="Whose condition lasts; those that are shelved, in maintenance or out of service apart.",
                        stacked=True,
                    ),
                    lines(
                        "Alarms a firm in 10 minutes",
                        ("max by (quantile) (smdih_anomaly_firm_alarms_10_minutes)", "{{quantile}} of firms"),
                        why="Over the firms that had any. The line is the flood limit of ISA-18.2.",
                        levels=((None, GOOD), (10, BAD)),
                        section="alarmflood",
                    ),
                    lines(
                        "From sample to alarm",
                        (f"({quantile(0.5, 'smdih_anomaly_alarm_seconds')}) or vector(0)", "half"),
                        (f"({quantile(0.99, 'smdih_anomaly_alarm_seconds')}) or vector(0)", "99 %"),
                        why="From the receipt of a sample to its stored alarm. Objective: 99 % within 10 s.",
                        unit="s",
                        levels=((None, GOOD), (10, BAD)),
                        section="alarmlatency",
                    ),
                    lines(
                        "Messages, by outcome",
                        (
                            "(sum by (kind, outcome) (increase(smdih_anomaly_deliveries_total[15m]))) or vector(0)",
                            "{{kind}} {{outcome}}",
                        ),
                        why="Tries to tell a contact, in 15 minutes.",
                    ),
                    lines(
                        "Messages that wait",
                        ("max(smdih_anomaly_deliveries_pending)", "waiting"),
                        ("max(smdih_anomaly_delivery_oldest_seconds)", "age of the oldest (s)"),
                        why="A contact gets at most 30 a minute, the rest waits.",
                        section="deliverieslate",
                    ),
                ],
            ),
            Part(
                "Detector",
                [
                    lines(
                        "Lag",
                        ('sum(smdih_kafka_lag_records{group="smdih.anomaly.worker"})', "records"),
                        why="Records not yet scored.",
                        section="consumerbehind",
                    ),
                    lines(
                        "Skipped frames",
                        (total("smdih_anomaly_frames_skipped_total"), "frames"),
                        why="Not newer than the newest of their machine: stored by the historian, not scored.",
                        unit="cps",
                    ),
                    lines(
                        "State in memory",
                        ("sum(smdih_anomaly_state_bytes)", "bytes"),
                        why="Of all workers.",
                        unit="bytes",
                    ),
                    lines(
                        "Machines held",
                        ("sum(smdih_anomaly_machines)", "machines"),
                        why="Channel groups whose state a worker holds.",
                    ),
                    lines(
                        "Time to store a checkpoint (99 %)",
                        (quantile(0.99, "smdih_anomaly_checkpoint_seconds"), "seconds"),
                        why="One slice of one partition.",
                        unit="s",
                    ),
                    lines(
                        "Checkpoints written",
                        (total("smdih_anomaly_checkpoint_bytes_total"), "bytes"),
                        why="Bytes of state a second.",
                        unit="Bps",
                    ),
                ],
            ),
        ],
    )


def matching() -> build.Dashboard:
    return board(
        "smdih-matching",
        "SMDIH: matching",
        "Whether firms that need help are offered it, whether the offers are answered, and how much room the providers have.",
        [
            Part(
                "Is it healthy?",
                [
                    tile("Needs open", 'max(smdih_matching_needs{state="open"})', why="Needs that wait for a match."),
                    tile(
                        "Needs without an offer",
                        "max(smdih_matching_needs_waiting)",
                        why="Open needs that nobody could be found for; they are tried again by themselves.",
                        levels=((None, GOOD), (1, WARN), (50, BAD)),
                        section="needswaiting",
                    ),
                    tile(
                        "Longest wait",
                        "max(smdih_matching_need_waiting_seconds)",
                        why="Age of the oldest open need without an offer.",
                        unit="s",
                        levels=((None, GOOD), (86_400, WARN), (604_800, BAD)),
                        section="needswaiting",
                    ),
                    tile("Offers open", "max(smdih_matching_offers_open)", why="Offers that nobody has answered yet."),
                    tile(
                        "Providers",
                        "max(smdih_matching_providers)",
                        why="In the index.",
                        levels=((None, BAD), (1, GOOD)),
                    ),
                    tile(
                        "Ranking by words alone",
                        "max(smdih_matching_degraded)",
                        why="1: the language model is not used, and rankings are weaker.",
                        levels=NONE_IS_GOOD,
                        section="matchingdegraded",
                    ),
                ],
            ),
            Part(
                "Needs and offers",
                [
                    lines(
                        "Needs opened",
                        (
                            "(sum by (source) (increase(smdih_matching_needs_opened_total[1h]))) or vector(0)",
                            "{{source}}",
                        ),
                        why="In an hour: by a firm's own words, or by alarms of a firm that agreed.",
                        stacked=True,
                    ),
                    lines(
                        "Offers, by what became of them",
                        ("(sum by (state) (increase(smdih_matching_offers_total[1h]))) or vector(0)", "{{state}}"),
                        why="In an hour.",
                    ),
                    lines(
                        "Matches",
                        ("max by (state) (smdih_matching_matches_current)", "{{state}}"),
                        why="By state, all of them.",
                        stacked=True,
                    ),
                    lines(
                        "Alarms taken in",
                        ("(sum by (outcome) (increase(smdih_matching_alarms_total[1h]))) or vector(0)", "{{outcome}}"),
                        why="What became of raised alarms, in an hour: a firm that has not agreed opens no need.",
                    ),
                    lines(
                        "Time to rank",
                        (f"({quantile(0.5, 'smdih_matching_rank_seconds')}) or vector(0)", "half"),
                        (f"({quantile(0.99, 'smdih_matching_rank_seconds')}) or vector(0)", "99 %"),
                        why="To rank the providers for a need.",
                        unit="s",
                    ),
                    lines(
                        "Lag",
                        ('sum by (topic) (smdih_kafka_lag_records{group=~"smdih.matching.+"})', "{{topic}}"),
                        why="Alarms not yet taken in.",
                        section="consumerbehind",
                    ),
                ],
            ),
            Part(
                "Room",
                [
                    lines(
                        "Places of this quarter",
                        ("max by (state) (smdih_matching_places)", "{{state}}"),
                        why="Of active providers that have a limit.",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Refused for want of a place",
                        ("sum(increase(smdih_matching_capacity_refused_total[1h]))", "acceptances"),
                        why="In an hour. A provider is never over-committed.",
                    ),
                    lines(
                        "Waiting for a seat",
                        ("max(smdih_matching_bookings_waiting)", "bookings"),
                        why="On waiting lists of workshops and courses.",
                    ),
                ],
            ),
        ],
        since="now-6h",
        refresh="30s",
    )


def fund() -> build.Dashboard:
    pounds = "currencyGBP"
    return board(
        "smdih-fund",
        "SMDIH: the fund",
        "Where the money is, whether the ledger is in order, and what waits for a decision. Metrics are in pence, shown in pounds.",
        [
            Part(
                "Is it healthy?",
                [
                    tile(
                        "Ledger off by",
                        "max(abs(smdih_funding_trial_balance_pence)) / 100",
                        why="Total of all balances. 0, always.",
                        unit=pounds,
                        levels=((None, GOOD), (0.01, BAD)),
                        section="ledgerunbalanced",
                    ),
                    tile(
                        "Accounts that disagree",
                        "max(smdih_funding_disagreeing_accounts)",
                        why="Whose balance is not what their transfers make; looked at every five minutes.",
                        levels=NONE_IS_GOOD,
                        section="ledgerunbalanced",
                    ),
                    tile("Awards", "max(smdih_funding_awards)", why="All of them."),
                    tile(
                        "Granted",
                        "max(smdih_funding_awarded_grant_pence) / 100",
                        why="Grants of all awards.",
                        unit=pounds,
                    ),
                    tile(
                        "Co-invested",
                        "max(smdih_funding_awarded_co_investment_pence) / 100",
                        why="By business, in awarded projects.",
                        unit=pounds,
                    ),
                    tile("Calls open", "max(smdih_funding_calls_open)", why="Which take applications now."),
                ],
            ),
            Part(
                "Money",
                [
                    lines(
                        "Public money",
                        (
                            'max by (account) (smdih_funding_balance_pence{account=~"programme_budget|public_(budget|committed|held|paid|recovered)"}) / 100',
                            "{{account}}",
                        ),
                        why="By what it is doing.",
                        unit=pounds,
                        width=12,
                        stacked=True,
                    ),
                    lines(
                        "Co-investment",
                        (
                            'max by (account) (smdih_funding_balance_pence{account=~"co_investment_(pledged|committed|paid)"}) / 100',
                            "{{account}}",
                        ),
                        why="By what it is doing.",
                        unit=pounds,
                        width=12,
                        stacked=True,
                    ),
                    lines(
                        "Pounds of business for a pound of public money",
                        (
                            "max(smdih_funding_awarded_co_investment_pence) / clamp_min(max(smdih_funding_awarded_grant_pence), 1)",
                            "awarded",
                        ),
                        why="The programme's aim is 1.5: 30 million of co-investment for 20 million.",
                        width=8,
                        levels=((None, WARN), (1.5, GOOD)),
                    ),
                    lines(
                        "Paid",
                        ("sum(increase(smdih_funding_paid_pence_total[1d])) / 100", "a day"),
                        why="Grant money released by payments, in a day.",
                        unit=pounds,
                        width=8,
                    ),
                    rows_of(
                        "Balances",
                        "sort_desc(max by (account) (smdih_funding_balance_pence) / 100)",
                        why="Of all accounts of a kind. Sources are never above zero.",
                        width=8,
                        unit=pounds,
                    ),
                ],
            ),
            Part(
                "What waits for a decision",
                [
                    lines(
                        "Applications",
                        ("max by (state) (smdih_funding_applications)", "{{state}}"),
                        why="By state.",
                        stacked=True,
                    ),
                    lines(
                        "Claims",
                        ("max by (state) (smdih_funding_claims_current)", "{{state}}"),
                        why="By state.",
                        stacked=True,
                    ),
                    lines(
                        "Longest wait",
                        ("max(smdih_funding_application_waiting_seconds)", "application"),
                        ("max(smdih_funding_claim_waiting_seconds)", "claim"),
                        why="Of what was submitted and not decided.",
                        unit="s",
                    ),
                    lines(
                        "Decisions",
                        ("(sum by (result) (increase(smdih_funding_decisions_total[1d]))) or vector(0)", "{{result}}"),
                        why="In a day.",
                    ),
                    lines(
                        "Refused by a rule",
                        ("(sum by (reason) (increase(smdih_funding_refusals_total[1d]))) or vector(0)", "{{reason}}"),
                        why="In a day; each refusal names the rule.",
                    ),
                    lines(
                        "Ledger events written together",
                        (f"({quantile(0.5, 'smdih_funding_journal_batch_events')}) or vector(0)", "half"),
                        ('max(smdih_queue_items{queue="ledger"})', "waiting"),
                        why="In one transaction, and those that wait.",
                        section="queuefull",
                    ),
                ],
            ),
        ],
        since="now-7d",
        refresh="1m",
    )
