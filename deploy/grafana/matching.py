"""Whether firms that need help are offered it, and whether the offers are answered."""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, tile
from deploy.grafana.queries import grown, half_and_worst_or_none


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
                            grown("smdih_matching_needs_opened_total", "source", over="1h"),
                            "{{source}}",
                        ),
                        why="In an hour: by a firm's own words, or by alarms of a firm that agreed.",
                        stacked=True,
                    ),
                    lines(
                        "Offers, by what became of them",
                        (grown("smdih_matching_offers_total", "state", over="1h"), "{{state}}"),
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
                        (grown("smdih_matching_alarms_total", "outcome", over="1h"), "{{outcome}}"),
                        why="What became of raised alarms, in an hour: a firm that has not agreed opens no need.",
                    ),
                    lines(
                        "Time to rank",
                        *half_and_worst_or_none("smdih_matching_rank_seconds"),
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
