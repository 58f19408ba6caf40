"""Failures of one of two replicas, and how many of them clients see."""
