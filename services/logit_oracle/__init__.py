"""Logit oracle: scores every token under the version that sampled it."""
