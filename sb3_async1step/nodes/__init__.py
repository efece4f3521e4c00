"""Training on more than one machine, on Ray. Importing this package does not import ray."""
