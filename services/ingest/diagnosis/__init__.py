"""What the doors note of senders, and why a machine has no data."""
