"""Studies: the same training runs for several arms and seeds, one table, and a page that says what it shows."""
