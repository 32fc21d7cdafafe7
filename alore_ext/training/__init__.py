"""Fine-tuning runs: data, recipes, the loop, checkpoints, reports. What the command line is made of."""
