"""The block engine: plan, blocks, receipts, publishing, executors."""
