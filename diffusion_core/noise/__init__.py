"""Noise: processes (forward SDEs), schedules (sequences of sigma), draws (keyed noise)."""
