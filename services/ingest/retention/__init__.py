"""How long data are kept, and for how long the disk lasts."""
