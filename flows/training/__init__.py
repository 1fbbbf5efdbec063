"""Training beside the core's loop: the worker that runs it, and what follows the last step."""
