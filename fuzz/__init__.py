"""What nobody would send, sent: to every parser and to every door of a real hub. Bounded in time, replayed by its seed."""
