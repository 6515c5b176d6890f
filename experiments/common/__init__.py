"""What all experiments share: records, reports, data, the training loop and the command line."""
