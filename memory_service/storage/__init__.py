"""Where banks and chunks are kept: one folder per engine, and what all engines share."""
