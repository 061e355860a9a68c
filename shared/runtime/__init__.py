"""Bus, config, metrics, logs and process life cycle."""
