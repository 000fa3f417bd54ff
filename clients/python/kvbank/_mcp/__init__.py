"""A memory of texts for programs that speak the Model Context Protocol: `kvbank mcp`."""
