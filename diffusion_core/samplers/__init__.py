"""Samplers of the prior, one algorithm a file."""
