"""Algorithms on tensors and parameters in training, without Hugging Face."""
