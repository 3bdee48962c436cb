"""Measured comparisons that train and ask: above the rooms that do either."""
