"""Values only: tasks, baselines, training recipes, starter weights."""
