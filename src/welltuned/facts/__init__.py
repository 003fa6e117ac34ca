"""What is measured before anything is chosen: the model, the dataset, the machine."""
