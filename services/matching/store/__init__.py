"""SQL of matching. Every function works inside the caller's transaction."""
