"""The blueprint: the definition of every tensor of the result, its costs and its caveats."""
