"""The settings of a training run, and the command line and YAML file that give them."""
