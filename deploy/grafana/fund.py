"""Where the money is, whether the ledger is in order, and what waits for a decision."""

from grafana_foundation_sdk.builders import dashboard as build

from deploy.grafana.parts import BAD, GOOD, NONE_IS_GOOD, WARN, Part, board, lines, rows_of, tile
from deploy.grafana.queries import grown, quantile


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
                        why="Of what was submitted: applications until they are decided, claims until they are paid.",
                        unit="s",
                    ),
                    lines(
                        "Decisions",
                        (grown("smdih_funding_decisions_total", "result", over="1d"), "{{result}}"),
                        why="In a day.",
                    ),
                    lines(
                        "Refused by a rule",
                        (grown("smdih_funding_refusals_total", "reason", over="1d"), "{{reason}}"),
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
