"""Networks: F inside the preconditioner that makes it D."""
