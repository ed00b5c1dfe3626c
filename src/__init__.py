"""Mixture of Lookup Experts (arXiv:2503.15798): train, turn experts into tables, infer from disk."""
