"""The four Lagwise services. Siblings: none imports another."""
