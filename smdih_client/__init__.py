"""Client of the Smart Manufacturing Data Innovation Hub."""

from smdih_client.telemetry import Refused, TelemetryClient, Totals

__all__ = ["Refused", "TelemetryClient", "Totals"]
