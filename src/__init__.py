"""Mixture of Lookup Experts (arXiv:2503.15798): train, re-parameterise to tables, infer from disk."""
