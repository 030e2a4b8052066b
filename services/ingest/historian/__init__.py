"""From the message log into the database: frames, their rollups, and the position, in one transaction."""
