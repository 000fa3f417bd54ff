"""The commands of every package of this project take their options, print and end by this package, which is not for
users."""
