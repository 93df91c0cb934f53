"""One update, from a replica's share of the effective batch to the new weights."""
