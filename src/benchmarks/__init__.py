"""Programs that measure. Each states its machine, prints a table and writes JSON."""
