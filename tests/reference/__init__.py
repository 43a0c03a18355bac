"""Slow, obvious float64 oracles; they share no code and no approach with the package."""
