"""The whole hub at a glance, from the door to the award."""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, tile
from deploy.grafana.queries import RATE, by, quantile, total

TELEMETRY = '{call=~".*(/telemetry|/write|/SendBatches|/StreamBatches)"}'
AVAILABILITY = (
    f"1 - clamp_max(sum(rate(smdih_faults_total{TELEMETRY}[1h])) "
    "/ clamp_min(sum(rate(smdih_ingest_door_requests_total[1h])), 1e-9), 1)"
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
                        "max(smdih_ingest_missing_batches) + max(smdih_anomaly_records_lost)",
                        why="Batches that a door acknowledged and that never came out of the message log, and records that were gone before they were scored. Objective: 0, always.",
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
