"""What is done with a trained net: evaluate, compare, export, predict, promote, import."""
