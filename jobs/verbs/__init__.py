"""The verbs of the command `adaptnet`, one module each."""
