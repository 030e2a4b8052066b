"""Signals that senders name and machines do not have yet, proposed to their firm."""
