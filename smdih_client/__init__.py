"""Client of the Smart Manufacturing Data Innovation Hub."""

from smdih_client.buffer import BufferFull, DiskBuffer, Sync
from smdih_client.telemetry import Refused, TelemetryClient, Totals

__all__ = ["BufferFull", "DiskBuffer", "Refused", "Sync", "TelemetryClient", "Totals"]
