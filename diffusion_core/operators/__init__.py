"""Generic linear maps; the physics lives in domains/."""
