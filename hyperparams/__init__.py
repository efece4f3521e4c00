"""Hyperparameters for the RL Zoo, one YAML file for each algorithm."""
