"""Running the tools that an environment brings."""
