"""Environments that ship with Lagwise."""
