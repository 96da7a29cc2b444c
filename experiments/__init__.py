"""Every number in docs/: the runs, what they gave (*.jsonl), and the tables and figures from it."""
