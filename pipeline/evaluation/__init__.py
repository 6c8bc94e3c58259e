"""Measures the accuracy and the cost of a trained net, policy by policy."""
