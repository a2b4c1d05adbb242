"""Is a data set ready to train on? `python -m finetune.check --help`."""
