"""What is done with adapters after training."""
