"""What is done with a finished run: found, proven, judged beside its base, made stronger or weaker, handed on."""
