"""The fusion model in pure PyTorch: arrays and tensors in, arrays and tensors out."""
