"""Settings of the anomaly service's processes."""

from typing import Literal

from pydantic import Field

from services.common.settings import Settings

SCHEMA = "anomaly"
# How often detector states are stored.
CHECKPOINT_INTERVAL_S = 2.0


class AnomalySettings(Settings):
    """The compiled kernel is kept in NUMBA_CACHE_DIR, where that is set (numba reads it itself)."""

    # Name of this worker that outlives a restart, such as a pod's: its partitions then come back to it at once.
    anomaly_instance: str = ""
    anomaly_checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    # A folder with the kernel as it was compiled before, for this code; the worker copies it into NUMBA_CACHE_DIR.
    anomaly_kernel: str = ""
    # How long alarms are kept after they ended, with their history; those that last are kept.
    anomaly_alarms_kept_days: int = Field(1_096, ge=90, le=36_500)
    # host:port of ingest's gRPC: explanations and previews of rules show samples from there, asked for with the caller's own key.
    ingest_grpc: str = ""
    # Networks that webhooks may call though they are not public, such as ["10.2.0.0/16"]; there also without TLS, by number.
    anomaly_webhook_networks: list[str] = []
    # What contacts' secrets are sealed with: base64 of 32 random bytes each, blanks between. The first seals, all open.
    anomaly_seal_keys: str = Field("", repr=False)
    # The mail server of alarm messages; empty: no mail. anomaly_smtp_tls: starttls, tls or none.
    anomaly_smtp_host: str = ""
    anomaly_smtp_port: int = Field(587, ge=1, le=65535)
    anomaly_smtp_sender: str = "SMDIH alarms <alarms@localhost>"
    anomaly_smtp_username: str = ""
    anomaly_smtp_password: str = Field("", repr=False)
    anomaly_smtp_tls: Literal["starttls", "tls", "none"] = "starttls"
