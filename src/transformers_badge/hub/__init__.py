"""What lies beside the weights in a checkpoint: policy, model card, a digest of the training rows."""
