"""Env agents: play episodes against environments, ask rollouts for tokens."""
