"""Rewards from checking an answer: exact match, maths equivalence, unit tests in a sandbox."""
