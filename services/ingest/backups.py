"""How old the newest dump of the database is, for who watches."""

from prometheus_client import Gauge

from services.common.database import Pool, transaction

# When the newest dump ended, in seconds since 1970; where there is none yet, when one began to be waited for.
finished = Gauge("smdih_backup_finished_timestamp_seconds", "In the database: when the newest dump ended")


class BackupGauge:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def measure(self) -> None:
        """Raises TryAgain."""
        async with transaction(self._pool) as connection:
            finished.set(await connection.fetchval("SELECT extract(epoch FROM max(finished))::float8 FROM backup_run"))
