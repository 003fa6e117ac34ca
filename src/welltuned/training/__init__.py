"""From a recipe to a Run: prepare the data and the plan, train, evaluate, verify, write down what happened."""
