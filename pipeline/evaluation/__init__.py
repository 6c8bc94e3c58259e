"""How good a trained net is and what it costs, policy by policy."""
