"""Posterior solvers, one a file, all with the signature of protocols.Solver."""
