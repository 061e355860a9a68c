"""Rollout: token ids in, stamped tokens and sampler log-probs out."""
