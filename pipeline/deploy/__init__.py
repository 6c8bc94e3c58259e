"""Uses of a trained net: evaluate, compare, export, predict, promote, import."""
