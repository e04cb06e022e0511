"""Predicts what training takes, and picks what each layer keeps so that it fits."""
