"""Figures of machines: states, OEE, energy, cost, carbon; signed where they are evidence."""
