"""Environments in processes of their own: what hangs, leaks, forks or dies costs its episode."""
