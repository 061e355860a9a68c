"""An OpenAI-compatible endpoint per episode: any agent that speaks it can be trained as it is."""
