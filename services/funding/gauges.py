"""How applications, claims and awards stand, counted in the database for those who watch. The money is in `balances`."""

import math
from collections import Counter as Count

from prometheus_client import Gauge

from services.common.database import Pool, transaction
from services.funding import agreement_store
from services.funding.agreement import ClaimState
from services.funding.domain import ApplicationState, uk_midnight_after

INTERVAL_S = 15.0

# All of these are counted in the database, so each process of the service shows the same.
applications = Gauge("smdih_funding_applications", "In the database: applications", ["state"])
application_waiting_seconds = Gauge(
    "smdih_funding_application_waiting_seconds", "In the database: time that the oldest submitted application waits"
)
claims = Gauge("smdih_funding_claims_current", "In the database: claims", ["state"])
claim_waiting_seconds = Gauge(
    "smdih_funding_claim_waiting_seconds", "In the database: time that the oldest claim waits to be decided and paid"
)
# What the law asks for by a day (decision 5, TR-1); infinite while nothing is due, and until it is counted.
subsidy_entry_due_timestamp_seconds = Gauge(
    "smdih_funding_subsidy_entry_due_timestamp_seconds",
    "In the database: end of the day by which the next award has to be in the public subsidy database",
)
subsidy_entry_due_timestamp_seconds.set(math.inf)
calls_open = Gauge("smdih_funding_calls_open", "In the database: calls that take applications now")
awards = Gauge("smdih_funding_awards", "In the database: awards")
awarded_grant_pence = Gauge("smdih_funding_awarded_grant_pence", "In the database: grants awarded")
awarded_co_investment_pence = Gauge(
    "smdih_funding_awarded_co_investment_pence", "In the database: co-investment of awarded projects"
)


class ProgressGauges:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def measure(self) -> None:
        """Raises TryAgain."""
        async with transaction(self._pool) as connection:
            of_applications = await connection.fetch("SELECT state, count(*) AS n FROM application GROUP BY state")
            of_claims = await connection.fetch("SELECT state, count(*) AS n FROM claim GROUP BY state")
            row = await connection.fetchrow(
                "SELECT "
                "(SELECT coalesce(extract(epoch FROM now() - min(submitted)), 0) FROM application "
                "WHERE state = 'submitted')::float8 AS application_s, "
                "(SELECT coalesce(extract(epoch FROM now() - min(submitted)), 0) FROM claim "
                "WHERE state IN ('submitted', 'decided'))::float8 AS claim_s, "
                "(SELECT count(*) FROM call WHERE opens <= now() AND closes > now()) AS calls, "
                "a.n, a.grants::float8, a.co_investments::float8 "
                "FROM (SELECT count(*) AS n, coalesce(sum(grant_pence), 0) AS grants, "
                "coalesce(sum(co_investment_pence), 0) AS co_investments FROM award) AS a"
            )
            due = await agreement_store.entries_due(connection, limit=1)
        assert row is not None
        counts = Count({found["state"]: found["n"] for found in of_applications})
        for state in ApplicationState:
            applications.labels(state).set(counts[state])
        counts = Count({found["state"]: found["n"] for found in of_claims})
        for claim_state in ClaimState:
            claims.labels(claim_state).set(counts[claim_state])
        application_waiting_seconds.set(row["application_s"])
        claim_waiting_seconds.set(row["claim_s"])
        subsidy_entry_due_timestamp_seconds.set(uk_midnight_after(due[0].due).timestamp() if due else math.inf)
        calls_open.set(row["calls"])
        awards.set(row["n"])
        awarded_grant_pence.set(row["grants"])
        awarded_co_investment_pence.set(row["co_investments"])
