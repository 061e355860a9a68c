"""What the services share: wire contract, algorithms, backends, runtime, weights, CLI."""
