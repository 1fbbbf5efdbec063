"""Scanned pages, screenshots and charts: a domain that is no part of Sashiko."""
