"""Weights on the card: their memory, and how they come to lie there."""
