"""Steps on the card: compiled launches, memory, graphs, the choice of tokens."""
