"""Many adapters on one frozen base, paired, and stopped early: what only the user's own data can settle."""
