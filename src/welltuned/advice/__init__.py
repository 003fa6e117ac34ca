"""From facts to choices: every hyperparameter with a value, a range, a reason and its evidence."""
