"""Client and service read and write the same bytes by this package, which is not for users."""
