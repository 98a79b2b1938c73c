"""Everything that touches a model: capture its features, run it, collect a teacher's statistics."""
