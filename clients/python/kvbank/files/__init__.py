"""Every package of this project makes, opens and locks files by this package, which is not for users."""
