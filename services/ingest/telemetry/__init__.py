"""From a sender to the message log: the doors, the checks, the group commit, and what was put aside."""
