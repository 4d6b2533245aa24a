"""The card: its driver, memory, streams, loaded code and libraries. Nothing here knows of models."""
