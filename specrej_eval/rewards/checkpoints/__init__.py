"""What reward families are made of: rendering, loading, bodies, heads, sessions, memory."""
