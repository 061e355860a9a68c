"""Customer service with tools: three domains, scripted users, reward from the final database."""
