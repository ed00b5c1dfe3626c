"""Independent of any model: files, hardware, ranks, random state, signals, and what a verb shows on a terminal."""
