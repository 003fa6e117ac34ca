"""What happened, why, and what to do next: one page of a Run that opens from disk."""
