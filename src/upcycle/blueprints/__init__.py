"""The blueprint: what every tensor of the result is, what that costs, what to know about it."""
