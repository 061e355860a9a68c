"""Learner: owns the policy, issues tickets, trains, publishes versions."""
