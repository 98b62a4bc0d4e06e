"""Shipped weights, each with its model card."""
