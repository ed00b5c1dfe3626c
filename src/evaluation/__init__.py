"""Scores, proofs and reports, for the command line, the callback and tests alike."""
