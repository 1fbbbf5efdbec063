"""Domain adapters: files, units, physics, baselines. Start with base.py."""
