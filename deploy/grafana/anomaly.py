"""Whether every sample is scored in time, and whether the alarms serve the people who must respond."""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, tile
from deploy.grafana.queries import grown, half_and_worst_or_none, quantile, total


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
                        *half_and_worst_or_none("smdih_anomaly_alarm_seconds"),
                        why="From the receipt of a sample to its stored alarm. Objective: 99 % within 10 s.",
                        unit="s",
                        levels=((None, GOOD), (10, BAD)),
                        section="alarmlatency",
                    ),
                    lines(
                        "Messages, by outcome",
                        (
                            grown("smdih_anomaly_deliveries_total", "kind", "outcome", over="15m"),
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
